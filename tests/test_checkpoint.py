"""save and load_: bit for bit, and every damaged file explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import FusedMoE, MoEModel, mlp, state_bytes, tiny_bert, tiny_gpt2, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from isqtorch.checkpoint import FORMAT_VERSION, load_, save
from isqtorch.formats import formats, get_format
from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantEmbedding, QuantLinear

IDS = torch.arange(12)[None]


def metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["isqtorch"])


def rewrite(path: Path, change) -> None:
    """Change the metadata of a saved file, and with `tensors` its contents."""
    tensors, header = load_file(path), metadata(path)
    change(header, tensors)
    path.unlink()
    save_file(tensors, path, {"isqtorch": json.dumps(header)})


@pytest.mark.parametrize("fmt", formats())
def test_round_trip_in_every_format(tmp_path: Path, fmt: str) -> None:
    model, other = nn.Sequential(nn.Embedding(8, 256), mlp(depth=2)), nn.Sequential(nn.Embedding(8, 256), mlp(depth=2))
    quantize_(model, fmt)
    save(model, tmp_path / "x.safetensors")
    load_(other, tmp_path / "x.safetensors")
    assert state_bytes(other) == state_bytes(model) and repr(other) == repr(model)
    assert torch.equal(other(IDS % 8), model(IDS % 8))


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, tiny_bert, lambda: tiny_llama(tied=True)], ids=["llama", "gpt2", "bert", "tied"]
)
def test_round_trip_of_whole_models(tmp_path: Path, build) -> None:
    model = build()
    quantize_(model, 4, topology={"0": "q8_0", "/key|k_proj|c_attn/": None})
    with torch.no_grad():
        want = model(IDS).logits
    save(model, tmp_path / "model.safetensors")
    other = build()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_(other.float(), tmp_path)  # a folder, and a skeleton of another type
    assert state_bytes(other) == state_bytes(model) and repr(other) == repr(model)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, want)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = tiny_llama(tied=True)
    quantize_(model, 4)
    save(model, path)
    assert metadata(path)["shared"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in load_file(path)
    other = tiny_llama(tied=False)
    load_(other, path)
    assert other.lm_head.weight is other.model.embed_tokens.weight
    other.tie_weights()
    dequantize_(other)
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_one_module_under_two_names(tmp_path: Path) -> None:
    def build() -> nn.ModuleDict:
        shared, block = nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64))
        return nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": block, "d": block})

    model, other = build(), build()
    quantize_(model, "q8_0")
    save(model, tmp_path / "x.safetensors")
    load_(other, tmp_path / "x.safetensors")
    assert other["a"] is other["b"][0] and type(other["c"][0]) is QuantLinear
    assert state_bytes(other) == state_bytes(model)


def test_into_meta_and_into_quantized_models(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = MoEModel().eval()
    quantize_(model, 4)
    save(model, path)
    with torch.device("meta"):
        empty = MoEModel()
    other = MoEModel()
    quantize_(other, "q8_0")
    for target in (empty, other):
        load_(target.eval(), path)
        assert torch.equal(target(IDS), model(IDS)) and state_bytes(target) == state_bytes(model)


def test_the_file_is_self_describing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = nn.ModuleDict({"table": nn.Embedding(8, 256), "proj": nn.Linear(256, 32, bias=False)}).to(torch.bfloat16)
    quantize_(model, "q4k")
    save(model, path)
    assert metadata(path) == {
        "format_version": FORMAT_VERSION,
        "layers": {
            "table": {"kind": "embedding", "format": "q6k", "in_features": 256, "out_features": 8, "dtype": "bfloat16"},
            "proj": {"kind": "linear", "format": "q4k", "in_features": 256, "out_features": 32, "dtype": "bfloat16"},
        },
        "shared": {},
    }
    assert {name: tensor.dtype for name, tensor in load_file(path).items()} == {
        "table.weight": torch.uint8,
        "proj.weight": torch.uint8,
    }


def test_the_layers_dtype_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 256)).half()
    quantize_(model, "q8_0")
    save(model, tmp_path / "x.safetensors")
    other = nn.Sequential(nn.Embedding(8, 256))
    load_(other, tmp_path / "x.safetensors")
    assert isinstance(other[0], QuantEmbedding) and other(torch.tensor([1])).dtype == torch.float16


def test_saving_over_a_file_replaces_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    model = mlp()
    quantize_(model, 4)
    save(model, path)
    other = mlp()
    load_(other, path)
    save(other, path)  # its tensors may be mapped from this very file
    again = mlp()
    load_(again, path)
    assert state_bytes(again) == state_bytes(model)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with torch.device("meta"), pytest.raises(ValueError, match=r"save: 0\.weight is on the meta device"):
        save(mlp(), path)
    assert path.read_bytes() == b"old"
    with pytest.raises(OSError):
        save(mlp(), tmp_path / "nowhere" / "x.safetensors")


class Pair(torch.Tensor):
    """A tensor made of two others, as those of torchao: it has no memory of its own."""

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scales: torch.Tensor) -> Pair:
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype, device=codes.device)
        self.codes, self.scales = codes, scales
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Pair:
        assert func.overloadpacket.__name__ in ("detach", "alias"), func
        return Pair(args[0].codes, args[0].scales)


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"step": 3}


def unstorable() -> dict[str, tuple[nn.Module, str]]:
    """Layers whose state no file of tensors can hold, and what is said of their weight."""
    made: dict[str, tuple[nn.Module, str]] = {}

    def add(name: str, weight: torch.Tensor, message: str) -> None:
        layer = nn.Module()
        layer.register_buffer("weight", weight)
        made[name] = (
            layer,
            rf"^save: 2\.weight is {message}, which a .safetensors file cannot hold\. Turn the layer into",
        )

    add(
        "wrapper",
        Pair(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1)),
        "a Pair of the package test_checkpoint, .*",
    )
    add("sparse", torch.eye(3).to_sparse(), "a tensor of the layout sparse_coo")
    add(
        "quantized",
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"a quantized tensor of torch \(qint8\)",
    )
    add("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor")
    add("complex128", torch.ones(3, dtype=torch.complex128), "a tensor of complex128")
    made["lazy"] = nn.LazyLinear(3), r"^save: 2\.weight has no shape yet\. Run the model once"
    made["meta"] = nn.Linear(3, 3, device="meta"), r"^save: 2\.weight is on the meta device and has no values\. Load"
    made["no tensor"] = Extra(3, 3), r"^save: 2\._extra_state is a dict; only tensors can be saved\. Remove it"
    return made


@pytest.mark.filterwarnings("ignore")  # torch calls nested and lazy tensors, and its own quantization, prototypes
@pytest.mark.parametrize("kind", "wrapper sparse quantized nested complex128 lazy meta".split() + ["no tensor"])
def test_what_no_file_can_hold_is_named(tmp_path: Path, kind: str) -> None:
    layer, message = unstorable()[kind]
    model = mlp(depth=2)
    quantize_(model, "q8_0")
    model.append(layer)
    with pytest.raises(ValueError, match=message):
        save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_views_with_other_values_than_their_memory(tmp_path: Path) -> None:
    def build(values: torch.Tensor) -> nn.Module:
        model = mlp()
        model.register_buffer("base", values)
        model.register_buffer("conjugate", values.conj())
        model.register_buffer("negative", values.conj().imag)
        return model

    values = torch.tensor([1 + 2j, 3 - 1j])
    model, again = build(values), build(torch.zeros_like(values).clone())
    again.negative, again.conjugate = torch.zeros(2), torch.zeros_like(values)
    assert model.conjugate.is_conj() and model.negative.is_neg()
    quantize_(model, "q8_0")
    save(model, tmp_path / "m.safetensors")
    load_(again, tmp_path / "m.safetensors")
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer), name
    again.conjugate = torch.zeros(2)
    with pytest.raises(ValueError, match=r"tensor conjugate is C64 \[2\], must be torch.float32"):
        load_(again, tmp_path / "m.safetensors")


def test_partly_shared_memory_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False))
    whole = torch.randn(16, 64)
    model[0].weight, model[1].weight = nn.Parameter(whole[:8]), nn.Parameter(whole[8:])
    save(model, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["1.weight"], whole[8:])


# ---- files that do not fit -------------------------------------------------------------------------------------------


def _set(header: dict, layer: str, **values) -> None:
    header["layers"][layer].update(values)


DAMAGE = {
    "newer": (lambda h, t: h.update(format_version=2), "format_version 2 is newer than 1"),
    "version": (lambda h, t: h.update(format_version="1"), "format_version is '1'"),
    "bool version": (lambda h, t: h.update(format_version=True), "format_version is True"),
    "no layers": (lambda h, t: h.pop("layers"), "must hold 'layers' and 'shared'"),
    "shared list": (lambda h, t: h.update(shared={"a": 1}), "'shared' must map names to names"),
    "layer": (lambda h, t: h["layers"].update({"0": []}), "layer '0': is not an object"),
    "kind": (lambda h, t: _set(h, "0", kind="conv"), "layer '0': unknown kind 'conv'"),
    "format": (lambda h, t: _set(h, "0", format="q9"), "layer '0': unknown format 'q9'"),
    "dtype": (lambda h, t: _set(h, "0", dtype="int8"), "layer '0': unknown dtype 'int8'"),
    "sizes": (lambda h, t: _set(h, "0", in_features=-256), "must be positive numbers"),
    "huge": (lambda h, t: _set(h, "0", in_features=1 << 60), "must be positive numbers"),
    "blocks": (lambda h, t: _set(h, "0", in_features=100), "in_features must be a positive multiple of 256"),
    "other size": (lambda h, t: _set(h, "0", in_features=512), r"0 is \[256, 512\], in the model it is \[256, 256\]"),
    "other kind": (
        lambda h, t: _set(h, "0", kind="embedding"),
        "0 is a packed embedding layer, the model has a Linear",
    ),
    "other format": (
        lambda h, t: _set(h, "0", format="q8_0"),
        r"tensor 0\.weight is U8 \[256, 144\], must be U8 \[256, 272\]",
    ),
    "unknown layer": (
        lambda h, t: h["layers"].update({"9": h["layers"]["0"]}),
        "9 is a packed linear layer, the model has nothing",
    ),
    "missing": (lambda h, t: t.pop("1.weight"), r"the file lacks 1\.weight"),
    "dangling": (lambda h, t: h["shared"].update({"1.weight": "gone"}), r"the file lacks 1\.weight"),
    "unexpected": (lambda h, t: t.update(extra=torch.zeros(1)), "the model does not have, extra"),
    "float weight": (
        lambda h, t: t.update({"0.weight": torch.zeros(256, 144)}),
        r"0\.weight is F32 \[256, 144\], must be U8",
    ),
    "bias shape": (
        lambda h, t: t.update({"0.bias": torch.zeros(5)}),
        r"0\.bias is F32 \[5\], must be torch.float32 \[256\]",
    ),
    "experts text": (lambda h, t: _set(h, "0", experts="x"), "experts is 'x', must be a positive number for experts"),
    "experts list": (lambda h, t: _set(h, "0", experts=[1]), r"experts is \[1\], must be"),
    "experts true": (lambda h, t: _set(h, "0", kind="experts", experts=True), "experts is True, must be"),
    "bias type": (lambda h, t: t.update({"0.bias": torch.zeros(256, dtype=torch.int32)}), r"0\.bias is I32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_change_nothing(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    path = tmp_path / "x.safetensors"
    model, target = mlp(), mlp()
    quantize_(model, 4)
    save(model, path)
    rewrite(path, change)
    before = state_bytes(target)
    with pytest.raises(ValueError, match=message):
        load_(target, path)
    assert state_bytes(target) == before and all(type(layer) is nn.Linear for layer in target)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"was not written by isqtorch\.checkpoint\.save"):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path, {"isqtorch": "{"})
    with pytest.raises(ValueError, match="is not JSON"):
        load_(mlp(), path)
    save_file({"a": torch.zeros(1)}, path, {"isqtorch": "[]"})
    with pytest.raises(ValueError, match="is not an object"):
        load_(mlp(), path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    model = mlp(width=64, depth=1)
    quantize_(model, "q8_0")
    save(model, path)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_(mlp(width=64, depth=1), path)


def test_buffers_that_no_file_has(tmp_path: Path) -> None:
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(64, 64)
            self.register_buffer("table", torch.ones(3), persistent=False)

    model = WithTable()
    quantize_(model, "q8_0")
    save(model, tmp_path / "x.safetensors")
    with torch.device("meta"):
        empty = WithTable()
    with pytest.raises(ValueError, match="the buffer table is on the meta device and not part of the state dict"):
        load_(empty, tmp_path / "x.safetensors")


@pytest.mark.parametrize("fmt", formats())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scales_that_are_not_finite(tmp_path: Path, fmt: str, value: float) -> None:
    path = tmp_path / "x.safetensors"
    model, target = mlp(depth=2), mlp(depth=2)
    quantize_(model, fmt)
    layout = model[1].packed["weight"]
    part = [part for part in get_format(layout).parts if part.real][-1]
    place = 3 * model[1].weight.shape[1] + part.offset  # the first block of row 3
    bad = torch.full((part.count,), 255 if part.exponents else value, dtype=part.dtype).view(torch.uint8)
    model[1].weight.data.view(-1)[place : place + part.nbytes] = bad
    save(model, path)
    before = state_bytes(target)
    with pytest.raises(ValueError, match=rf"1: row 3 has a {part.name} that is .*check_scales=False"):
        load_(target, path)
    assert state_bytes(target) == before
    load_(target, path, check_scales=False)
    assert state_bytes(target) == state_bytes(model)


@pytest.mark.parametrize(
    ("build", "dim", "where"), [(FusedMoE, 3, "expert 1"), (lambda: tiny_llama(tied=True), 2, "row 1")]
)
def test_scales_of_experts_and_shared_weights(tmp_path: Path, build, dim: int, where: str) -> None:
    path = tmp_path / "x.safetensors"
    model = build()
    quantize_(model, "q8_0")
    save(model, path)
    load_(build(), path)
    packed = next(p for p in model.parameters() if p.dtype == torch.uint8 and p.dim() == dim)
    packed.data[1].view(-1)[:2] = torch.tensor([float("nan")], dtype=torch.float16).view(
        torch.uint8
    )  # q8_0 begins with d
    save(model, path)
    with pytest.raises(ValueError, match=f"{where} has a d that is nan"):
        load_(build(), path)
