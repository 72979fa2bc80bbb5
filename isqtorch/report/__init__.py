"""Reports: what was done, or would be done, to every weight of a model."""
