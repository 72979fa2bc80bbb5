"""Quantizing a resident model peaks at its size plus the scratch of one layer, and gives the difference back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS, WIDTH = 32, 4096  # 1.07 GB in bf16
LAYER_BYTES = WIDTH * WIDTH * 2

SCRIPT = f"""
import json, torch
from torch import nn
from isqtorch.inplace.quantize import quantize_

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

torch.manual_seed(0)
quantize_(nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16)), FORMAT, measure_error=MEASURE)  # first-time costs
weight = torch.randn({WIDTH}, {WIDTH}, dtype=torch.bfloat16)
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear({WIDTH}, {WIDTH}, bias=False, dtype=torch.bfloat16) for _ in range({LAYERS})))
for layer in model:
    layer.weight = nn.Parameter(weight.clone())
del weight, layer
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # sets the peak to the present
before = status("VmRSS")
report = quantize_(model, FORMAT, measure_error=MEASURE)
print(json.dumps({{"before": before, "peak": status("VmHWM"), "after": status("VmRSS"), "packed": report.bytes_after}}))
"""


@pytest.mark.parametrize(
    ("fmt", "measure"),
    [
        ("q8_0", False),
        pytest.param("q4k", True, marks=pytest.mark.slow),
        pytest.param("afq4", False, marks=pytest.mark.slow),
        pytest.param("fp8", False, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_of_a_gigabyte(fmt: str, measure: bool) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    script = SCRIPT.replace("FORMAT", repr(fmt)).replace("MEASURE", repr(measure))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if "PermissionError" in result.stderr:
        pytest.skip("this container does not allow to reset the peak")
    assert result.returncode == 0, result.stderr
    rss = json.loads(result.stdout)
    assert rss["before"] > LAYERS * LAYER_BYTES
    assert rss["peak"] - rss["before"] < 3 * LAYER_BYTES, rss
    assert rss["before"] - rss["after"] > LAYERS * LAYER_BYTES - rss["packed"] - 3 * LAYER_BYTES, rss
