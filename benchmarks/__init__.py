"""Benchmarks: how to run them and what they mean is in README.md."""
