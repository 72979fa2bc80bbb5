"""What turns the sources into wheels that others install: building, repairing, and trying them as a user would."""
