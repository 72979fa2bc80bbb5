"""Whole models: what loading one takes and how fast it generates. `benchmarks/bench_models.py` is the command."""
