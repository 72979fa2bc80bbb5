"""isqtorch inside other libraries. Nothing else in the package imports these, the command line excepted."""
