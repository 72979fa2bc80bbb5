"""requantize_: from the source again, all at once for whoever runs the model, or not at all."""

from __future__ import annotations

import _thread
import copy
import itertools
import json
import pickle
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import same_bits
from models import mlp, state_bytes
from safetensors.torch import load_file, save_file
from test_experts import HIDDEN
from test_experts import Model as MoE
from torch import Tensor, nn

import isqtorch
from isqtorch import checkpoint, dequantize_, exchange, listeners, quantize_, requantize, requantize_
from isqtorch.report import QuantReport

GLOBAL_HOOKS = nn.modules.module._global_forward_pre_hooks


def stored(model: nn.Module, folder: Path, name: str = "model.safetensors") -> Path:
    """The model's weights as its checkpoint."""
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / name)
    return folder / name


def quantized(model: nn.Module, fmt: str | None, **options: Any) -> nn.Module:
    quantize_(model, fmt, **options)
    return model


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when something fails: bytes, the very modules, and their own state."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return state_bytes(model), {n: id(m) for n, m in modules.items()}, {n: list(vars(m)) for n, m in modules.items()}


# ---- from the source -------------------------------------------------------------------------------------------------


def test_from_two_bits_it_is_the_model_quantized_afresh(tmp_path: Path) -> None:
    file = stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    report = requantize_(model, "q8_0", source=file, measure_error=True)
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q8_0"))
    assert report["0"].dtype == "q2k" and report["0"].stored == "q8_0" and report["0"].error < 0.01
    assert f"made from the weights in {tmp_path}" in report.notes and report.seconds > 0
    assert requantize_(model, "q3k")["1"].stored == "q3k"  # the source is remembered
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q3k"))
    dequantize_(model)
    quantize_(model, "q8_0")
    with pytest.raises(ValueError, match="not known where"):  # these weights are not those of the file
        requantize_(model, "q3k")


def test_importance_on_the_same_format(tmp_path: Path) -> None:
    file = stored(mlp(), tmp_path)
    model, im = quantized(mlp(), "q4k"), {"0": torch.rand(256) + 0.01}
    before = state_bytes(model)
    report = requantize_(model, "q4k", source=tmp_path, imatrix=im)
    assert state_bytes(model) == state_bytes(quantized(mlp(), "q4k", imatrix=im)) != before
    assert report["0"].reason == "made anew"
    requantize_(model, "q4k", source=str(file))
    assert state_bytes(model) == before


def test_experts_and_what_was_left_in_float(tmp_path: Path) -> None:
    stored(MoE(), tmp_path)
    model = quantized(MoE(), "q4_0", include="experts")
    old = model.experts
    requantize_(model, "q8_0", source=tmp_path, topology={"/down_proj/": "q5_0"}, include="")
    assert model.experts is not old and old.formats == {"gate_up_proj": "q4_0", "down_proj": "q4_0"}
    assert model.experts.formats == {"gate_up_proj": "q8_0", "down_proj": "q5_0"}
    assert state_bytes(model) == state_bytes(quantized(MoE(), "q8_0", topology={"/down_proj/": "q5_0"}))
    assert model(torch.randn(3, HIDDEN)).isfinite().all()


def test_the_first_request_holds_until_another_one_says_otherwise(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k", topology={"/^1$/": "q6k"}, exclude="2", fallback="skip")
    formats: Callable[[QuantReport], list[str | None]] = lambda report: [layer.stored for layer in report.layers]  # noqa: E731
    assert formats(requantize_(model, "q3k", source=tmp_path)) == ["q3k", "q6k", None]
    assert formats(requantize_(model, "q2k", exclude=())) == ["q2k", "q6k", "q2k"]
    assert formats(requantize_(model, "q5k", topology={}, include="0")) == ["q5k", "q6k", "q2k"]
    assert formats(requantize_(model, "q8_0")) == ["q8_0", "q6k", "q2k"]  # include, now
    assert formats(requantize_(model, "q8_0", include="")) == ["q8_0"] * 3
    with pytest.raises(ValueError, match=r"entry '0' names a device, and requantize_ moves no layer"):
        requantize_(model, "q8_0", topology={0: {"device": "cpu"}})


def test_ties_and_shared_modules(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(64, 256), nn.Linear(256, 64, bias=False)
            self.head.weight = self.embed.weight
            self.once = self.twice = nn.Linear(256, 256)

    tensors = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    for name in ("embed.weight", "twice.weight", "twice.bias"):
        del tensors[name]  # a file has a shared tensor once, under whichever name
    save_file(tensors, tmp_path / "model.safetensors")
    model = quantized(Tied(), "q4k")
    requantize_(model, "q8_0", source=tmp_path)
    assert model.head.weight is model.embed.weight and model.once is model.twice
    assert state_bytes(model) == state_bytes(quantized(Tied(), "q8_0"))


def test_stored_weights_only_if_asked_for(tmp_path: Path) -> None:
    model = quantized(mlp(), "q8_0")
    with pytest.raises(
        ValueError, match=r"not known where the model's weights came from. Give source=.* or source='stored'"
    ):
        requantize_(model, "q4k")
    decoded = model[0].dequantize()
    report = requantize_(model, "q4_0", source="stored")
    assert same_bits(model[0].weight, torch.ops.isqtorch.quantize(decoded, "q4_0"))
    assert any("their errors stay" in note for note in report.notes)
    with pytest.raises(ValueError, match="not known"):
        requantize_(model, "q4k")


def test_a_model_from_a_file_says_that_its_request_is_not_known(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    checkpoint.save(quantized(mlp(), "q8_0"), tmp_path / "packed.safetensors")
    model = mlp()
    checkpoint.load_(model, tmp_path / "packed.safetensors")
    report = requantize_(model, "q4k", source=tmp_path / "model.safetensors")
    assert any("only those of this call" in note for note in report.notes)
    with pytest.raises(ValueError, match="is quantized by isqtorch itself"):
        requantize_(model, "q4k", source=tmp_path / "packed.safetensors")


def test_the_source_goes_where_the_model_goes(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    requantize_(model, "q4k", source=tmp_path)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        requantize_(again, "q8_0")
        assert again[0].format == "q8_0" and model[0].format == "q4k"
    checkpoint.save(model, tmp_path / "packed.safetensors")
    checkpoint.load_(model, tmp_path / "packed.safetensors")  # it could have been any file
    with pytest.raises(ValueError, match="not known where"):
        requantize_(model, "q8_0")


# ---- a source that does not fit --------------------------------------------------------------------------------------


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["1.weight"]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["1.weight"] = tensors["1.weight"][:128].clone()


def pack(tensors: dict[str, Tensor]) -> None:
    tensors["1.weight"] = tensors["1.weight"].to(torch.int8)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["2.weight"][255, 7] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"has no 1\.weight\. Give source=.* source='stored'.* or exclude the layer"),
        (reshape, r"1\.weight is \[128, 256\] in .*, \[256, 256\] in the model\. Give source"),
        (pack, r"1\.weight is I8, must be one of F64, F32, F16, BF16\. Give source"),
        (poison, r"requantize_: 2: .*finite.* Nothing was changed"),
    ],
)
def test_what_is_wrong_with_a_source(tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str) -> None:
    tensors = load_file(stored(mlp(), tmp_path))
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = quantized(mlp(), "q4k")
    before = everything(model)
    with pytest.raises(ValueError, match=message):
        requantize_(model, "q8_0", source=tmp_path)
    assert everything(model) == before


def test_a_model_that_was_trained_since(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k")
    requantize_(model, "q8_0", source=tmp_path)
    with torch.no_grad():
        model[1].bias[17] += 1e-6
    before = everything(model)
    with pytest.raises(ValueError, match=r"1\.bias is not what .* has: the model was changed since"):
        requantize_(model, "q4k")
    assert everything(model) == before
    (tmp_path / "other").mkdir()
    stored(mlp(), tmp_path / "other")
    with pytest.warns(UserWarning, match=r"1\.bias is not what .* stay as they are"):
        requantize_(model, "q4k", source=tmp_path / "other")
    assert model[1].format == "q4k"


def test_layers_without_values_here(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q4k")
    model[1].to("meta")
    with pytest.raises(
        ValueError, match="1 is on the meta device: it is offloaded or spread over processes. Exclude it"
    ):
        requantize_(model, "q8_0", source=tmp_path)
    assert requantize_(model, "q8_0", source=tmp_path, exclude="1")["1"].stored == "q4k"


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x10" + b"\0" * 7 + b'{"a":1}' + b" " * 9])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    model = quantized(mlp(), "q4k")
    before = everything(model)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        requantize_(model, "q8_0", source=tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"0.weight": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="is not a plain file name"):
        requantize_(model, "q8_0", source=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        requantize_(model, "q8_0", source=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors"):
        requantize_(model, "q8_0", source=tmp_path / "empty")
    assert everything(model) == before


# ---- all or nothing --------------------------------------------------------------------------------------------------


class Failing:
    """Fails at the call of this number."""

    def __init__(self, function: Callable[..., Any], number: int, error: BaseException) -> None:
        self.function, self.left, self.error = function, number, error

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise self.error
        return self.function(*args, **options)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=["interrupt", "memory"])
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ((requantize, "pack_weight"), 2),
        ((exchange, "_put"), 1),
        ((exchange, "_synchronize"), 1),
        ((requantize, "announce"), 1),
    ],
    ids=["packing", "exchanging", "before", "telling"],
)
def test_a_failure_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str], number: int, error: BaseException
) -> None:
    stored(MoE(), tmp_path)
    model = quantized(MoE(), "q4_0", exclude="up_proj")
    requantize_(model, "q5_0", source=tmp_path)
    before = everything(model)
    module, name = where
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Failing(getattr(module, name), number, error))
        with pytest.raises(type(error)):
            requantize_(model, "q8_0", exclude=())
    assert everything(model) == before and not GLOBAL_HOOKS
    assert requantize_(model, "q4_0").requested == "q4_0"
    assert state_bytes(model) == state_bytes(quantized(MoE(), "q4_0", exclude="up_proj"))


def test_listeners_hear_of_it_and_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(mlp(), tmp_path)
    model, heard = quantized(mlp(), "q4_0"), []

    def listener(model: nn.Module, report: QuantReport | None) -> None:
        heard.append(model[0].format)
        if len(heard) == 1:
            raise OSError("full")

    monkeypatch.setattr(listeners, "_listeners", [listener])
    with pytest.raises(OSError, match="full"):
        requantize_(model, "q8_0", source=tmp_path)
    assert heard == ["q8_0", "q4_0"]


# ---- while other threads run the model -------------------------------------------------------------------------------


class Deep(nn.Module):
    """Many layers, so that a call lasts, with a part that users call by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(depth=12)
        self.head = nn.Linear(256, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Callers:
    """Threads that call the model until they are told to stop, and keep every result."""

    def __init__(self, call: Callable[[], Tensor], threads: int) -> None:
        self.results: list[Tensor] = []
        self.errors: list[BaseException] = []
        self._call, self._stop = call, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while not self._stop.is_set():
                    self.results.append(self._call())
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 120
        while len(self.results) < number and not self.errors and time.monotonic() < deadline:
            time.sleep(0.001)


@pytest.mark.parametrize("part", ["", "body"], ids=["model", "part"])
def test_a_thousand_forwards_during_four_swaps(tmp_path: Path, part: str) -> None:
    stored(Deep(), tmp_path)
    model, x = quantized(Deep(), "q2k"), torch.randn(1, 256)
    origin = {"source": tmp_path}
    called: Callable[[], nn.Module] = lambda: model.get_submodule(part)  # noqa: E731
    with torch.no_grad():
        want = {}
        for fmt in ("q8_0", "q2k"):
            requantize_(model, fmt, **origin)
            want[fmt] = called()(x)
        assert not torch.equal(want["q2k"], want["q8_0"])
        with Callers(lambda: called()(x), threads=3) as callers:
            for swap in range(4):
                callers.wait_for(250 * swap + 125)
                requantize_(model, ("q8_0", "q2k")[swap % 2])
            callers.wait_for(1000)
    assert not callers.errors and len(callers.results) >= 1000
    which = [next((f for f in want if torch.equal(result, want[f])), "a mixture") for result in callers.results]
    assert set(which) == {"q2k", "q8_0"}
    assert sum(a != b for a, b in itertools.pairwise(which)) >= 4
    assert not GLOBAL_HOOKS


def test_layer_by_layer_there_would_be_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without the gate, and one layer after the other, calls see both."""

    def slowly(
        model: nn.Module, swaps: list[exchange.Swap], after: Callable[[], None], undo: Callable[[], None]
    ) -> None:
        for swap in swaps:
            swap.parent._modules[swap.name] = swap.new
            time.sleep(0.01)
        after()

    monkeypatch.setattr(requantize, "exchange", slowly)
    stored(Deep(), tmp_path)
    model, x = quantized(Deep(), "q2k"), torch.randn(1, 256)
    with torch.no_grad(), Callers(lambda: model(x), threads=2) as callers:
        old = model(x)
        requantize_(model, "q8_0", source=tmp_path)
        new = model(x)
    assert any(not torch.equal(result, old) and not torch.equal(result, new) for result in callers.results)


class Waiting(nn.Module):
    """A call that lasts until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.entered, self.released = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.entered.set()
        assert self.released.wait(60)
        return self.layers[2](self.layers[1](x))


def test_a_call_that_has_begun_ends_with_the_layers_it_began_with(tmp_path: Path) -> None:
    stored(Waiting(), tmp_path)
    model, x = quantized(Waiting(), "q2k"), torch.randn(1, 256)
    model.released.set()
    old = model(x).detach()
    model.entered.clear()
    model.released.clear()
    with Callers(lambda: model(x), threads=1) as callers:
        model.entered.wait(60)
        swap = threading.Thread(target=requantize_, args=(model, "q8_0"), kwargs={"source": tmp_path})
        swap.start()
        while not GLOBAL_HOOKS:
            time.sleep(0.001)
        late = Callers(lambda: model(x), threads=1)
        with late:
            time.sleep(0.05)
            assert model.layers[1].format == "q2k" and swap.is_alive() and not late.results
            model.released.set()
            swap.join(60)
            late.wait_for(1)
    assert torch.equal(callers.results[0], old) and not late.errors
    assert torch.equal(late.results[0], model(x)) and not torch.equal(late.results[0], old)


def test_patience_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PATIENCE", 0.05)
    stored(Waiting(), tmp_path)
    model = quantized(Waiting(), "q2k")
    before = everything(model)
    with Callers(lambda: model(torch.ones(1, 256)), threads=1):
        model.entered.wait(60)
        with pytest.raises(RuntimeError, match="other threads are inside a forward of the model"):
            requantize_(model, "q8_0", source=tmp_path)
        model.released.set()
    assert everything(model) == before and not GLOBAL_HOOKS


def test_not_from_inside_a_forward(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    model[1].register_forward_hook(lambda *_: requantize_(model, "q8_0", source=tmp_path))
    with pytest.raises(ValueError, match="from inside a forward of this model"):
        model(torch.ones(1, 256))
    assert model[0].format == "q2k"


def test_layers_that_others_replaced_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(mlp(), tmp_path)
    model = quantized(mlp(), "q2k")
    original, calls = requantize.pack_weight, []

    def meddling(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            model[0] = nn.Identity()
        return original(*args)

    monkeypatch.setattr(requantize, "pack_weight", meddling)
    with pytest.raises(RuntimeError, match="layer '0' was replaced by other code meanwhile"):
        requantize_(model, "q8_0", source=tmp_path)
    assert model[1].format == "q2k"


def test_interrupts_at_any_moment(tmp_path: Path) -> None:
    """All of one format or all of the other, whenever Ctrl-C comes, and nobody is left waiting at the gate."""
    stored(Deep(), tmp_path)
    model, x = quantized(Deep(), "q2k"), torch.randn(1, 256)
    requantize_(model, "q8_0", source=tmp_path)
    began = time.perf_counter()
    requantize_(model, "q2k")
    took, random_ = time.perf_counter() - began, random.Random(0)
    interrupted, ended = 0, set()
    with Callers(lambda: model(x), threads=1) as callers:
        for number in range(40):
            timer = threading.Timer(random_.uniform(0, 3 * took), _thread.interrupt_main)
            try:
                timer.start()
                requantize_(model, ("q8_0", "q2k")[number % 2])
                timer.join()
            except KeyboardInterrupt:
                interrupted += 1
            formats = {module.format for module in model.modules() if isinstance(module, isqtorch.QuantLinear)}
            assert len(formats) == 1
            ended |= formats
            callers.wait_for(len(callers.results) + 2)
    assert not callers.errors and interrupted > 10 and ended == {"q2k", "q8_0"}
    with torch.no_grad():
        want = [(requantize_(model, fmt), model(x))[1] for fmt in ("q2k", "q8_0")]
    assert all(any(torch.equal(result, y) for y in want) for result in callers.results)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(mlp(), tmp_path)
    model, original = quantized(mlp(), "q2k"), requantize.pack_weight
    before = everything(model)

    def meddling(*args: Any) -> Any:
        stored(mlp(), tmp_path, "other")
        (tmp_path / "other").replace(tmp_path / "model.safetensors")
        return original(*args)

    monkeypatch.setattr(requantize, "pack_weight", meddling)
    with pytest.raises(ValueError, match=r"model\.safetensors: was replaced or written to while it was read"):
        requantize_(model, "q8_0", source=tmp_path)
    assert everything(model) == before


def test_hooks_and_gradients_go_on(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model, seen = quantized(mlp(), "q4k").train(), []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module.format))
    x = torch.randn(2, 256, requires_grad=True)
    old = weakref.ref(model[0])
    y = model(x)
    (want,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    requantize_(model, "q8_0", source=tmp_path)
    (late,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(late, want)  # of the layers that the forward ran through
    model(x)
    assert seen == ["q4k", "q8_0"] and model[1].training
    handle.remove()
    model(x)
    assert len(seen) == 2 and old() is None


def test_a_compiled_model_is_compiled_anew(tmp_path: Path) -> None:
    stored(mlp(), tmp_path)
    model, x = quantized(mlp(), "q4k"), torch.randn(2, 256)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    old = compiled(x)
    requantize_(model, "q8_0", source=tmp_path)
    assert torch.equal(compiled(x), model(x)) and not torch.equal(model(x), old)
