"""requantize_ while others use the model: all at once for whoever runs it, or not at all."""

from __future__ import annotations

import _thread
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FusedMoE, everything, mlp, quantized, state_bytes, stored
from torch import Tensor, nn

import isqtorch
from isqtorch import requantize_
from isqtorch.inplace import exchange, host, requantize
from isqtorch.report.report import QuantReport

GLOBAL_HOOKS = nn.modules.module._global_forward_pre_hooks


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
    stored(FusedMoE(), tmp_path)
    model = quantized(FusedMoE(), "q4_0", exclude="up_proj")
    requantize_(model, "q5_0", source=tmp_path)
    before = everything(model)
    module, name = where
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Failing(getattr(module, name), number, error))
        with pytest.raises(type(error)):
            requantize_(model, "q8_0", exclude=())
    assert everything(model) == before and not GLOBAL_HOOKS
    assert requantize_(model, "q4_0").requested == "q4_0"
    assert state_bytes(model) == state_bytes(quantized(FusedMoE(), "q4_0", exclude="up_proj"))


def test_hosts_hear_of_it_and_of_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(mlp(), tmp_path)
    model, heard = quantized(mlp(), "q4_0"), []

    class Listener:
        def files(self, model: nn.Module) -> None: ...

        def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> None: ...

        def changed(self, model: nn.Module, report: QuantReport | None) -> None:
            heard.append(model[0].format)
            if len(heard) == 1:
                raise OSError("full")

    monkeypatch.setattr(host, "_hosts", [Listener()])
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
