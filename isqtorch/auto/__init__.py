"""Automatic mixed precision: measure what each format would cost each layer, then choose the best that fits a budget.

sensitivity.py   what an error in each weight of a layer costs, and what each format's error comes to
curvature.py     the best answer to the first: the curvature of the KL divergence, from a few backward passes
knapsack.py      one format per layer, least total cost, never above the budget
auto.py          the whole: `quantize_(model, "auto", target_bpw=4.5)`
plot.py          error and bits per layer
"""

from isqtorch.report.choice import Choice

from .budget import Budget
from .choose import Auto, choose_formats, smallest_choice

__all__ = ["Auto", "Budget", "Choice", "choose_formats", "smallest_choice"]
