"""Building a model from a checkpoint of another program, with a checkpoint in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import isqtorch
from isqtorch.formats import get_format
from isqtorch.integrations.checkpoints.assemble import assemble
from isqtorch.integrations.checkpoints.incoming import Checkpoint, Held, Incoming
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import owner_of
from isqtorch.modules.parameter import plain_bytes
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request
from tests.models import logits, quantized, state_bytes, tiny_gpt2, tiny_llama, tiny_moe

CPU = torch.device("cpu")


def llama(**options: Any) -> Any:
    return tiny_llama(dtype=torch.float32, **options)


class InMemory(Checkpoint, Incoming):
    """The weights of a model, partly packed."""

    def __init__(self, model: Any, held: dict[str, Held] | None = None) -> None:
        self.where, self.files, self.kind = "memory.test", (), "test"
        self.model = model
        self.known = held or {}
        self.read_names: list[str] = []

    def config(self) -> Any:
        return self.model.config

    def tokenizer(self) -> Any:
        raise ValueError("no tokenizer")

    def generation(self) -> dict[str, Any]:
        return {}

    def weights(self, model: Any) -> Incoming:
        return self

    def _module(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def held(self, name: str) -> Held | None:
        if name in self.known:
            return self.known[name]
        if name not in self.model.state_dict():
            return None
        module, leaf = self._module(name)
        packed = isinstance(module, PackedModule) and leaf in module.packed
        return Held(get_format(module.packed[leaf]) if packed else None)

    def blocks(self, name: str) -> Tensor:
        module, leaf = self._module(name)
        return plain_bytes(module._parameters[leaf]).clone()

    def read(self, name: str) -> Tensor | None:
        self.read_names.append(name)
        module, leaf = self._module(name)
        if isinstance(module, PackedModule) and leaf in module.packed:
            return module.as_before(leaf).float()
        return self.model.state_dict()[name].float()

    def sample(self, name: str, shape: tuple[int, ...]) -> list[Tensor] | None:
        return None

    def unused(self, names: Iterable[str]) -> list[str]:
        return sorted(set(self.model.state_dict()) - set(names))

    def release(self) -> None:
        pass


def empty(like: Any) -> Any:
    """The model without weights, as `load` makes it."""
    config = like.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def opened(source: Any, request: Request | None = None, held: dict[str, Held] | None = None) -> tuple[Any, Any]:
    model = empty(source)
    return model, assemble(model, InMemory(source, held), request, CPU)


@pytest.mark.parametrize(
    "build", [lambda: llama(), lambda: llama(tied=True), tiny_gpt2, tiny_moe], ids=["llama", "tied", "conv1d", "moe"]
)
def test_blocks_are_taken_over(build: Any) -> None:
    source = quantized(build().float(), "q4k")
    model, report = opened(source)
    assert state_bytes(model) == state_bytes(source)
    assert torch.equal(logits(model), logits(source))
    assert model.isq_report is report
    assert {layer.name for layer in report.layers if layer.stored} == set(source.config.quantization_config.layers)
    assert model.config.quantization_config.layers == source.config.quantization_config.layers


def test_packed_anew_is_what_requantize_makes_of_the_decoded_weights() -> None:
    source = quantized(llama(), "q8_0")
    model, report = opened(source, Request("q4k", Options(), "load"))
    expected = isqtorch.quantize_(isqtorch.dequantize_(source) or source, "q4k")
    assert state_bytes(model) == state_bytes(source)
    assert [layer.stored for layer in report.layers] == [layer.stored for layer in expected.layers]


def test_a_weight_in_the_asked_format_stays_as_it_is() -> None:
    source = quantized(llama(), "q4k")
    checkpoint = InMemory(source)
    model = empty(source)
    assemble(model, checkpoint, Request("q4k", Options(), "load"), CPU)
    assert state_bytes(model) == state_bytes(source)
    assert not any("proj" in name for name in checkpoint.read_names)


def test_a_weight_that_the_request_excludes_stays_packed_as_it_was() -> None:
    source = quantized(llama(), "q8_0")
    model, report = opened(source, Request("q4k", Options(exclude="down_proj"), "load"))
    assert model.model.layers[0].mlp.down_proj.format == "q8_0"
    assert model.model.layers[0].mlp.up_proj.format == "q4k"
    assert "down_proj" in report["model.layers.0.mlp.down_proj"].reason


def test_a_type_without_a_format_is_packed_in_the_one_named_instead() -> None:
    source = llama()
    name = "model.layers.0.mlp.up_proj.weight"
    held = {name: Held(instead=get_format("q5k"), note="iq3_s in the file, which is no format here")}
    model, report = opened(source, held=held)
    layer = owner_of(model, "model.layers.0.mlp.up_proj")[0]
    assert layer.format == "q5k"
    assert "iq3_s" in report["model.layers.0.mlp.up_proj"].reason
    packed = isqtorch.quantize(source.model.layers[0].mlp.up_proj.weight.detach(), "q5k")
    assert torch.equal(plain_bytes(layer.weight), packed.data)
    assert [each.name for each in report.quantized] == ["model.layers.0.mlp.up_proj"]


def test_experts_of_which_one_stack_is_float_become_float() -> None:
    source = tiny_moe()
    packed = quantized(tiny_moe(), "q4_0")
    name = "model.layers.0.mlp.experts"

    class Half(InMemory):
        def _module(self, key: str) -> tuple[nn.Module, str]:
            path, _, leaf = key.rpartition(".")
            return (packed if leaf == "down_proj" else source).get_submodule(path), leaf

    model = empty(source)
    report = assemble(model, Half(source), None, CPU)
    experts = model.get_submodule(name)
    assert not isinstance(experts, PackedModule)
    assert torch.equal(experts.down_proj, packed.get_submodule(name).dequantize("down_proj"))
    assert torch.equal(experts.gate_up_proj, source.get_submodule(name).gate_up_proj)
    assert "gate_up_proj of the same experts is float" in report[f"{name}.down_proj"].reason
    assert logits(model).isfinite().all()


def test_a_float_checkpoint_gives_a_float_model() -> None:
    source = llama(tied=True)
    model, report = opened(source)
    assert state_bytes(model) == state_bytes(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not report.quantized


def test_a_missing_weight_is_an_error_that_names_it() -> None:
    source = llama()
    shorter = llama(layers=1)
    model = empty(source)
    for request in (None, Request("q4k", Options(), "load")):
        with pytest.raises(ValueError, match=r"memory.test has no model\.layers\.1\."):
            assemble(model, InMemory(shorter), request, CPU)


def test_a_weight_of_another_shape_is_an_error_that_names_it() -> None:
    model = empty(llama(hidden=512))
    with pytest.raises(ValueError, match=r"load: memory.test: model\.\S+ is .* and the configuration makes it"):
        assemble(model, InMemory(llama()), None, CPU)


def test_bytes_that_cannot_be_of_their_format_are_an_error() -> None:
    source = quantized(llama(), "q4k")
    plain_bytes(source.model.layers[0].mlp.up_proj.weight).fill_(255)
    with pytest.raises(ValueError, match=r"up_proj\.weight: its bytes are not q4k"):
        opened(source)


def test_tensors_without_a_place_are_in_the_report() -> None:
    source = llama()
    source.register_buffer("left_over", torch.zeros(3))
    _, report = opened(source)
    assert any("left_over" in note for note in report.notes)
