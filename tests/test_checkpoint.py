"""save and load_: bit for bit, and every damaged file explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import MoEModel, mlp, state_bytes, tiny_bert, tiny_gpt2, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from isqtorch.checkpoint import FORMAT_VERSION, load_, save
from isqtorch.formats import formats
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
