"""Weights that other programs have quantized, against what those programs decode. golden/README.md describes the file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import GOLDEN, golden
from safetensors import safe_open
from torch import Tensor

from isqtorch.formats.stored import Header, StoredFiles, StoredWeight, method_of
from isqtorch.ops import reference

DATA = golden("stored")
with safe_open(GOLDEN / "stored.safetensors", framework="pt") as _file:
    ENTRIES: dict[str, dict[str, Any]] = json.loads(_file.metadata()["entries"])

# float32 all the way; nested scales of bitsandbytes are sums of a product and an offset, which it may fuse
ROUNDED = {"bnb_nf4_nested", "bnb_nf4_nested_odd", "bnb_fp4_nested", "bnb_fp4_nested_odd"}

KEPT = {
    "ct_int4_g32_sym": "hqq4g32",
    "ct_int4_g64_asym": "hqq4",
    "ct_int3_g32_sym": "hqq4g32",
    "ct_int8_g64_asym": "hqq8",
    "ct_int8_rows": "hqq8",
    "ct_mxfp4": "mxfp4",
    "hqq8_axis1": "hqq8",
    "hqq4_axis1": "hqq4",
    "hqq3_axis1": "hqq4",
    "hqq2_axis1": "hqq4",
    "hqq1_axis1": "hqq4",
    "gpt_oss_mxfp4": "mxfp4",
}


def files_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> StoredFiles:
    headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return StoredFiles(
        headers, lambda name, expert: tensors[name] if expert is None else tensors[name][expert], metadata
    )


def opened(case: str) -> tuple[StoredFiles, StoredWeight]:
    prefix = f"{case}/tensors/"
    tensors = {key.removeprefix(prefix): tensor for key, tensor in DATA.items() if key.startswith(prefix)}
    metadata = {"a.weight": ENTRIES[case]["of_weight"]} if "of_weight" in ENTRIES[case] else {}
    files = files_of(tensors, metadata)
    weights, hidden = method_of(ENTRIES[case]).find(files)
    assert hidden == tensors.keys()  # nothing is left over that a model would not know
    [weight] = weights.values()
    return files, weight


def decoded(files: StoredFiles, weight: StoredWeight) -> Tensor:
    if len(weight.shape) == 2:
        return weight.decode(weight.matrix(files))
    return torch.stack([weight.decode(weight.matrix(files, expert)) for expert in range(weight.shape[0])])


@pytest.mark.parametrize("case", ENTRIES)
def test_decoded(case: str) -> None:
    files, weight = opened(case)
    values = DATA[f"{case}/values"]
    found = decoded(files, weight)
    assert found.dtype == torch.float32
    assert tuple(found.shape) == weight.shape == tuple(values.shape)
    assert weight.name == ("a" if case == "gpt_oss_mxfp4" else "a.weight")
    if case in ROUNDED:
        torch.testing.assert_close(found, values, rtol=3e-7, atol=0)
    else:
        assert torch.equal(found, values), float((found - values).abs().max())


@pytest.mark.parametrize("case", ENTRIES)
def test_kept(case: str) -> None:
    """Blocks of each format that holds the weight decode to the same values."""
    files, weight = opened(case)
    formats, why = weight.kept(files)
    assert (formats[0].name if formats else None) == KEPT.get(case), why
    assert bool(why) != bool(formats)
    for fmt in formats:
        experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
        blocks = [weight.blocks(weight.matrix(files, expert), fmt) for expert in experts]
        values = torch.stack([reference.dequantize(rows, fmt.name, torch.float32) for rows in blocks])
        assert torch.equal(values.reshape(weight.shape), DATA[f"{case}/values"]), fmt.name
