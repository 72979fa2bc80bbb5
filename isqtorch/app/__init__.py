"""Our own program: loading a model for the commands, chat, benchmark, and the server."""
