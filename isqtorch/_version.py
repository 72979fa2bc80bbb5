"""The version, in one place: setuptools reads this file without importing torch."""

__version__ = "0.1.0"
