"""Automatic mixed precision: measure the cost of each format in each layer, then choose the best within a budget.

budget.py        the options of "auto", checked
sensitivity.py   the cost of the errors that a format makes in a layer
curvature.py     the most accurate cost: the curvature of the KL divergence, from a few backward passes
knapsack.py      one format per layer with the smallest total cost within the budget
choose.py        all of it together: `quantize_(model, "auto", target_bpw=4.5)`
"""

from .budget import AUTO_OPTIONS, Budget
from .choose import Auto, choose_formats

__all__ = ["AUTO_OPTIONS", "Auto", "Budget", "choose_formats"]
