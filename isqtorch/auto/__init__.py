"""Automatic mixed precision: measure what each format would cost each layer, then choose the best that fits a budget.

sensitivity.py   what an error in each weight of a layer costs, and the error of each format
curvature.py     the best answer to the first: the curvature of the KL divergence, from a few backward passes
knapsack.py      one format per layer, least total cost, never above the budget
choose.py        the whole: `quantize_(model, "auto", target_bpw=4.5)`
"""

from .budget import AUTO_OPTIONS, Budget
from .choose import Auto, choose_formats

__all__ = ["AUTO_OPTIONS", "Auto", "Budget", "choose_formats"]
