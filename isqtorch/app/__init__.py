"""The program behind the commands: loads models, chats, measures speed, and serves a model over HTTP."""
