"""Every type of model that transformers has, made small: is all that isqtorch promises true for it?

`python -m tests.sweep` runs it, and writes docs/models.md if it ran for all types.
"""
