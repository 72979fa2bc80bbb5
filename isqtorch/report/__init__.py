"""What happened to every weight of a model, or would happen."""
