"""Weights that other programs have quantized, against what those programs decode. golden/README.md describes the file."""

from __future__ import annotations

import json
import random
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


def compressed_int4() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(tensors, codes less their zero, scales) of a weight of compressed-tensors with groups of 32."""
    prefix = "ct_int4_g32_sym/tensors/"
    tensors = {key.removeprefix(prefix): tensor for key, tensor in DATA.items() if key.startswith(prefix)}
    scales = tensors["a.weight_scale"].float()
    return tensors, torch.round(DATA["ct_int4_g32_sym/values"] / scales.repeat_interleave(32, 1)), scales


def test_columns_in_any_group() -> None:
    """compressed-tensors with act-order: `weight_g_idx`. -1 everywhere means that it is not used."""
    tensors, codes, scales = compressed_int4()
    index = torch.arange(192).flip(0) // 32
    for stored, group in ((index, index), (torch.full((192,), -1), torch.arange(192) // 32)):
        files = files_of({**tensors, "a.weight_g_idx": stored.int()}, {})
        weights, hidden = method_of(ENTRIES["ct_int4_g32_sym"]).find(files)
        weight = weights["a.weight"]
        assert "a.weight_g_idx" in hidden
        assert torch.equal(decoded(files, weight), codes * scales[:, group])
        assert bool(weight.kept(files).formats) == (stored is not index)


def test_words_of_whole_codes() -> None:
    """Older compressed-tensors: ten codes of 3 bits in a word, and two bits unused."""
    codes = torch.randint(0, 8, (6, 192), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(codes, (0, 8)).view(6, 20, 10)
    words = sum(padded[..., i] << 3 * i for i in range(10))
    assert isinstance(words, Tensor)
    scales = torch.full((6, 3), 0.5)
    tensors = {"a.weight_packed": words.int(), "a.weight_scale": scales, "a.weight_shape": torch.tensor([6, 192])}
    files = files_of(tensors, {})
    entry = ENTRIES["ct_int3_g32_sym"]
    weights, _ = method_of(entry).find(files)
    assert torch.equal(decoded(files, weights["a.weight"]), (codes - 4) * 0.5)


# ---- damaged tensors -------------------------------------------------------------------------------------------------

TYPES = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.bool,
)


def damaged(tensors: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """The tensors with one or two faults: a tensor is missing, has another type or shape, or other contents."""
    out = dict(tensors)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(sorted(out))
        tensor, fault = out[name], chance.randrange(7)
        if fault == 0 and len(out) > 1:
            del out[name]
        elif fault == 1:
            out[name] = tensor.float().to(chance.choice(TYPES))
        elif fault == 2:
            out[name] = tensor.flatten()
        elif fault == 3 and tensor.dim():
            out[name] = tensor[: chance.randrange(tensor.shape[0] + 1)]
        elif fault == 4 and tensor.dim():
            out[name] = tensor[..., : chance.randrange(tensor.shape[-1] + 1)]
        elif fault == 5:
            out[name] = tensor[None]
        elif fault == 6 and tensor.numel():
            octets = tensor.contiguous().flatten().view(torch.uint8).clone()
            for _ in range(chance.choice((1, 8))):
                octets[chance.randrange(len(octets))] = chance.choice((0, 127, 128, 255, chance.randrange(256)))
            out[name] = octets.view(tensor.dtype).view(tensor.shape)
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize("case", ENTRIES)
def test_damage_is_a_clear_error_or_harmless(case: str) -> None:
    """Never another kind of error, and never values of another shape."""
    chance = random.Random(case)
    prefix = f"{case}/tensors/"
    whole = {key.removeprefix(prefix): tensor for key, tensor in DATA.items() if key.startswith(prefix)}
    refused = 0
    for _ in range(60):
        files = files_of(damaged(whole, chance), {})
        try:
            weights, _ = method_of(ENTRIES[case]).find(files)
            for weight in weights.values():
                assert tuple(decoded(files, weight).shape) == weight.shape
                for fmt in weight.kept(files).formats[:1]:
                    experts = range(weight.shape[0]) if len(weight.shape) == 3 else [None]
                    blocks = [weight.blocks(weight.matrix(files, expert), fmt) for expert in experts]
                    assert all(rows.shape == (weight.shape[-2], fmt.row_bytes(weight.shape[-1])) for rows in blocks)
        except (ValueError, NotImplementedError) as error:
            assert "a" in str(error)
            refused += 1
    assert refused > 5
