"""`save_pretrained` of classes that do not record formats: an error with the way out, and no file that nobody can read."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FusedMoE, mlp, quantized, state_bytes
from safetensors.torch import save_file
from torch import nn

import isqtorch
from isqtorch import checkpoint


class Own(nn.Module):
    """A user's class with a save_pretrained of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table = mlp(), nn.Embedding(64, 256)

    def save_pretrained(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "weights.safetensors")


class OfTensors(Own):
    """As diffusers: it saves what `state_dict` gives, in a function that it calls."""

    def save_pretrained(self, folder: Path) -> None:
        def gathered(module: nn.Module) -> dict[str, torch.Tensor]:
            return dict(module.state_dict(prefix="model."))

        save_file(gathered(self), folder / "weights.safetensors")


class Pickled(Own):
    def save_pretrained(self, folder: Path) -> None:
        torch.save(self.state_dict(), folder / "weights.pt")


class Pipeline:
    """No module: it calls save_pretrained of its parts."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def save_pretrained(self, folder: Path) -> None:
        self.part.save_pretrained(folder)


class Careful(Own):
    """It knows the way out."""

    def save_pretrained(self, folder: Path) -> None:
        checkpoint.save(self, folder / "model.safetensors")


def hub_class() -> type[nn.Module]:
    hub = pytest.importorskip("huggingface_hub")
    return type(
        "OnTheHub", (Own, hub.PyTorchModelHubMixin), {"save_pretrained": hub.PyTorchModelHubMixin.save_pretrained}
    )


def of_timm() -> Any:
    """timm's function takes the model as an argument."""
    module = types.ModuleType("timm.models._hub")
    exec("def save_for_hf(model, folder):\n    return model.state_dict()\n", vars(module))
    return module.save_for_hf


def saver(kind: str) -> tuple[nn.Module, Callable[[Path], Any]]:
    """A model, and what saves it."""
    if kind == "timm":
        model: Any = Own()
        save_for_hf = of_timm()
        return model, lambda folder: save_for_hf(model, folder)
    model = hub_class()() if kind == "hub" else {"own": Own, "tensors": OfTensors, "pickled": Pickled}.get(kind, Own)()
    return model, (Pipeline(model).save_pretrained if kind == "pipeline" else model.save_pretrained)


@pytest.mark.parametrize("kind", ["own", "tensors", "pickled", "hub", "pipeline", "timm"])
def test_the_error_names_the_layer_and_the_way_out(kind: str, tmp_path: Path) -> None:
    model, save = saver(kind)
    isqtorch.quantize_(model, "q4k", exclude="table")
    function = "save_for_hf" if kind == "timm" else "save_pretrained"
    prefix = r"model\." if kind == "tensors" else ""
    wanted = (
        rf"^{function} of {type(model).__name__}: {prefix}body\.0\.weight is packed as q4k, .*checkpoint\.save\(model"
    )
    with pytest.raises(ValueError, match=wanted):
        save(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".pt")]
    checkpoint.save(model, tmp_path / "model.safetensors")  # the first way out
    again = type(model)()
    checkpoint.load_(again, tmp_path / "model.safetensors")
    assert state_bytes(again) == state_bytes(model)
    isqtorch.dequantize_(model)  # the second
    save(tmp_path)


def test_embeddings_and_experts_are_seen_too(tmp_path: Path) -> None:
    class Experts(Own):
        def __init__(self) -> None:
            super().__init__()
            self.moe = FusedMoE()

    for include, wanted in (
        ("table", "table.weight is packed as q8_0"),
        ("moe", r"moe\.experts\.[a-z_]* is packed as q8"),
    ):
        model = Experts()
        isqtorch.quantize_(model, "q8_0", include=include)
        with pytest.raises(ValueError, match=wanted):
            model.save_pretrained(tmp_path)


def test_a_model_around_packed_layers(tmp_path: Path) -> None:
    """The model itself was never quantized: it was made of a quantized part."""
    model = Own()
    model.body = quantized(mlp(), "q8_0")
    with pytest.raises(ValueError, match=r"^save_pretrained of Own: body\.0\.weight is packed as q8_0"):
        model.save_pretrained(tmp_path)


def test_what_keeps_the_formats_is_not_refused(tmp_path: Path) -> None:
    model = Careful()
    isqtorch.quantize_(model, "q4k")
    model.save_pretrained(tmp_path)
    again = Careful()
    checkpoint.load_(again, tmp_path)
    assert state_bytes(again) == state_bytes(model)
    again.load_state_dict(model.state_dict())  # outside of any such function a state dict is as ever
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt"))


def test_parts_without_packed_layers_are_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"packed": mlp(), "plain": Own()})
    isqtorch.quantize_(model, "q4k", include="packed")
    model["plain"].save_pretrained(tmp_path)
    assert (tmp_path / "weights.safetensors").exists()
