"""Bytes that are read in another format: formats notice them, and state dicts without metadata are judged."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ALL_FORMATS, FORMATS, every_variant
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isqtorch import get_format, quantize_
from isqtorch.formats import QuantFormat
from isqtorch.modules.plausible import SWITCH, weight_fault
from isqtorch.quantizers import has_rule

COLUMNS = 1024


def drawn(seed: int = 0) -> Tensor:
    return torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(seed))


def packed(weight: Tensor, fmt: QuantFormat, importance: Tensor | None = None, rule: str | None = None) -> Tensor:
    return torch.ops.isqtorch.quantize(weight, fmt.name, importance, rule)


# ---- what a format says about blocks ---------------------------------------------------------------------------------

WEIGHTS = {
    "normal": drawn() * 0.02,
    "tiny": drawn() * 1e-6,
    "large": drawn() * 500,
    "heavy tails": drawn() / drawn(1).abs().clamp_min(1e-3),
    "rows of all sizes": drawn() * torch.logspace(-6, 0, 64)[:, None],
    "columns of all sizes": drawn() * torch.logspace(-4, 1, COLUMNS),
    "positive": drawn().abs() * 0.05,
    "rectified": drawn().relu() * 0.05,
    "negative": -drawn().abs() - 0.01,
    "far from zero": 1 + 0.1 * drawn(),
    "sparse": drawn() * (drawn(1) > 2),
    "ternary": drawn().sign() * (drawn(1) > 0) * 0.03,
    "zeros": torch.zeros(64, COLUMNS),
    "ones": torch.ones(64, COLUMNS),
    "one value": torch.full((64, COLUMNS), -0.02),
    "identity": torch.eye(64, COLUMNS),
    "most rows unused": drawn() * torch.where(torch.arange(64) % 4 == 0, 1.0, 1e-9)[:, None],
}


@every_variant
def test_weights_of_every_kind_are_plausible(fmt: QuantFormat) -> None:
    importance = torch.linspace(0.1, 2, COLUMNS)
    for name, weight in WEIGHTS.items():
        for rule, column in itertools.product((None, "search", "mlx"), (None, importance)):
            if rule is None or has_rule(fmt, rule):
                found = weight_fault(packed(weight, fmt, column, rule), fmt)
                assert found is None, f"{name}, rule {rule}: {found}"


ALIKE = {
    ("q4_1", "afq4g32.f16"),  # these differ only in the order of the codes
    ("q4_1", "hqq4g32"),
    ("q5_1", "afq5g32.f16"),
    ("q4_0", "iq4_nl"),  # these differ only in what the codes mean
    ("iq4_nl", "q4_0"),
    *((f"{name}g128{f16}", "iq4_xs") for name, f16 in (("afq4", ""), ("afq4", ".f16"), ("hqq4", ""))),  # one f16 in 256
    ("q8_1", "afq8g32.f16"),  # the sum of the codes is read as an offset
    ("q8_1", "hqq8g32"),
    ("hqq8g32", "q8_1"),
    *((f"afq2{group}", f"afq2{group}.f16") for group in ("", "g32", "g128")),  # two bits: both ends are near 1
}
"""(stored, read as) of one size that scales and offsets cannot tell apart."""

CONFUSABLE = [
    (stored, read)
    for stored, read in itertools.permutations(ALL_FORMATS, 2)
    if COLUMNS % stored.block == COLUMNS % read.block == 0 and stored.row_bytes(COLUMNS) == read.row_bytes(COLUMNS)
]


def test_formats_of_the_same_size_exist() -> None:
    names = {(stored.name, read.name) for stored, read in CONFUSABLE}
    assert set(itertools.permutations(("q4_0", "q4k", "afq4", "hqq4"), 2)) <= names and ALIKE <= names


@pytest.mark.parametrize(("stored", "read"), CONFUSABLE, ids=lambda fmt: fmt.name)
def test_another_format_of_the_same_size_is_noticed(stored: QuantFormat, read: QuantFormat) -> None:
    found = weight_fault(packed(WEIGHTS["normal"], stored), read)
    assert (found is None) == ((stored.name, read.name) in ALIKE), found


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_random_bytes_are_noticed(fmt: QuantFormat) -> None:
    raw = torch.randint(0, 256, (64, fmt.row_bytes(COLUMNS)), generator=torch.Generator().manual_seed(3))
    assert weight_fault(raw.to(torch.uint8), fmt) is not None


def test_a_code_that_is_nan() -> None:
    fmt = get_format("fp8")
    weight = packed(WEIGHTS["normal"], fmt)
    weight[0, 10] = 0x7F
    assert str(weight_fault(weight, fmt)).startswith("1 of ") and str(weight_fault(weight, fmt)).endswith(
        "codes are NaN"
    )


def test_only_a_sample_is_read() -> None:
    """A weight of many rows costs as much as a small one: its bytes may be mapped from a file."""
    fmt = get_format("q4k")
    weight = torch.empty(10**7, fmt.row_bytes(4096), dtype=torch.uint8, device="meta")
    assert weight_fault(weight, fmt) is None  # on meta there is nothing to judge
    rows = packed(WEIGHTS["normal"], fmt)[:1].expand(10**7, -1)  # one row in memory, 5 GB if it were copied
    assert weight_fault(rows, fmt) is None


def test_stacks_of_experts_are_judged() -> None:
    stored, read = get_format("q4k"), get_format("q4_0")
    stack = packed(WEIGHTS["normal"], stored).view(4, 16, -1)
    assert weight_fault(stack, stored) is None and weight_fault(stack, read) is not None


# ---- state dicts -----------------------------------------------------------------------------------------------------


def net(fmt: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    quantize_(model, fmt, progress=False)
    return model


def rebuilt(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict().items())


@pytest.mark.parametrize("way", ["dict", "file"])
def test_a_state_dict_without_metadata_is_loaded_with_one_warning(way: str, tmp_path: Path) -> None:
    model, ids = net("q4k"), torch.arange(5)
    wanted, state = model(ids), rebuilt(model)
    if way == "file":
        save_file(state, tmp_path / "weights.safetensors")
        state = load_file(tmp_path / "weights.safetensors")
    other = net("q4k")
    for parameter in other.parameters():
        parameter.data.zero_()
    with pytest.warns(UserWarning, match="does not say in which formats") as caught:
        other.load_state_dict(state)
    assert len(caught) == 1 and torch.equal(other(ids), wanted)
    with pytest.warns(UserWarning, match="lost its metadata"):  # the next call says it again
        other.load_state_dict(state)


def test_a_state_dict_with_metadata_is_loaded_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net("q4k").load_state_dict(net("q4k").state_dict())


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("q4k", "q4_0"),
        ("q4k", "afq4"),
        ("afq4", "hqq4"),
        ("hqq4", "q4k"),
        ("q5k", "afq5"),
        ("q8_0", "hqq8"),
        ("fp8", "afq8g128"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_another_format_is_refused(stored: str, asked: str, assign: bool) -> None:
    model, last = nn.Sequential(nn.Linear(256, 64)), net(stored)[3]
    state = {"0.weight": last.weight.detach(), "0.bias": last.bias.detach()}
    quantize_(model, asked, progress=False)
    before = model[0].weight.clone()
    with pytest.raises(
        RuntimeError, match=rf"0\.weight: this layer is {asked}, .* another format: read as {asked}, .*{SWITCH}=0"
    ):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model[0].weight, before)


def test_metadata_of_a_float_model_says_nothing() -> None:
    """The metadata is there, without an entry for the format: as without metadata."""
    state = nn.Sequential(nn.Linear(256, 64)).state_dict()
    packed_model = nn.Sequential(nn.Linear(256, 64))
    quantize_(packed_model, "q4k", progress=False)
    state["0.weight"] = packed_model[0].weight.detach()
    other = nn.Sequential(nn.Linear(256, 64))
    quantize_(other, "q4_0", progress=False)
    with pytest.raises(RuntimeError, match="read as q4_0"):
        other.load_state_dict(state)


def test_the_check_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    state, model = rebuilt(net("q4k")), net("q4_0")
    state = {name: value for name, value in state.items() if model.state_dict()[name].shape == value.shape}
    monkeypatch.setenv(SWITCH, "0")
    with pytest.warns(UserWarning, match="lost its metadata"):
        model.load_state_dict(state, strict=False)
