"""Collecting importance from any traffic: the statistic, what is watched, threads, errors, and what it costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import close, squares
from models import ConvNet, mlp, tiny_gpt2, tiny_llama, tiny_moe
from torch import Tensor, nn

import isqtorch
from isqtorch.importance.calibration import Calibration
from isqtorch.importance.imatrix import read_imatrix


class Recorder:
    """Everything that linear layers get, kept: the obvious way."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self.hook(name))

    def hook(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inputs.setdefault(name, []).append(args[0].detach().clone())


# ---- any traffic -----------------------------------------------------------------------------------------------------


def test_statistic_is_the_sum_of_squared_inputs() -> None:
    model = tiny_llama(tied=True)
    recorder = Recorder(model)
    with isqtorch.calibrate(model) as im, torch.no_grad():
        for length in (5, 17):
            model(torch.randint(0, 512, (2, length)))
    assert sorted(im) == sorted(recorder.inputs) and "lm_head" in im and len(im) == 15
    for name, inputs in recorder.inputs.items():
        close(im.sums[name], sum(squares(x) for x in inputs))
        assert im.counts[name].tolist() == [44] and im.sums[name].dtype == torch.float32
        torch.testing.assert_close(im[name], im.sums[name] / 44)
    assert im.tokens == 44


def test_quantized_layers_conv1d_and_convolutional_models() -> None:
    model = tiny_gpt2()
    isqtorch.quantize_(model, "q4k", include="attn")
    x = torch.randint(0, 512, (1, 9))
    with isqtorch.calibrate(model) as im:
        model(x)
    assert {"transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head"} <= set(im)
    assert im.sums["transformer.h.0.mlp.c_proj"].shape == (1024,)
    net = ConvNet()
    with isqtorch.calibrate(net) as im:
        net(torch.randn(2, 3, 8, 8))
    assert sorted(im) == ["fc", "small"]


def test_layers_with_the_same_input_share_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.ops.isqtorch.square_sums
    monkeypatch.setattr(torch.ops.isqtorch, "square_sums", lambda x: calls.append(x.shape) or real(x))
    model = tiny_llama(layers=1)
    with isqtorch.calibrate(model) as im:
        model(torch.randint(0, 512, (1, 8)))
    assert len(im) == 8 and len(calls) == 5  # q k v, o, gate up, down, head


def test_an_input_changed_in_place_is_read_again() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y + self.b(x.mul_(2))

    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, isqtorch.calibrate(model := Sneaky()) as im:
            model(torch.ones(3, 4))
        assert im["a"].tolist() == [1.0] * 4 and im["b"].tolist() == [4.0] * 4


def test_gradients_autocast_and_keyword_inputs_are_untouched() -> None:
    model = mlp()
    x = torch.randn(3, 256, requires_grad=True)
    want = torch.autograd.grad(model(x).sum(), x)[0]
    with isqtorch.calibrate(model) as im:
        got = torch.autograd.grad(model(x).sum(), x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            model[0](input=x)
    assert torch.equal(got, want)
    assert im.counts["0"].tolist() == [6] and im.counts["1"].tolist() == [3]
    assert not any(value.requires_grad for value in im.values())


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = tiny_moe()
    before = [dict(vars(module)) for module in model.modules()]
    implementation = model.config._experts_implementation
    with pytest.raises(RuntimeError, match="traffic"), isqtorch.calibrate(model) as im:
        model(torch.randint(0, 64, (1, 4)))
        raise RuntimeError("traffic")
    assert len(im) == 0  # what was collected is not lost, though:
    im.refresh()
    assert len(im) > 0
    for module, old in zip(model.modules(), before, strict=True):
        assert not module._forward_pre_hooks and not module._forward_hooks and vars(module).keys() == old.keys()
    assert model.config._experts_implementation == implementation
    with isqtorch.calibrate(model):  # and it can be calibrated again
        model(torch.randint(0, 64, (1, 4)))


def test_refresh_inside_the_block(tmp_path: Path) -> None:
    model = mlp()
    with isqtorch.calibrate(model) as im:
        model(torch.ones(2, 256))
        assert len(im) == 0 and im.tokens == 2
        im.refresh()
        im.save(tmp_path / "a.gguf")
        model(torch.ones(2, 256))
    assert read_imatrix(tmp_path / "a.gguf").counts["0"].tolist() == [2]
    assert im.counts["0"].tolist() == [4]


def test_forwards_of_many_threads() -> None:
    model = mlp(depth=2)
    x = torch.randn(10, 256)
    with isqtorch.calibrate(model) as im, torch.no_grad():
        threads = [threading.Thread(target=lambda: [model(x) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert im.counts["0"].tolist() == [800]
    close(im.sums["0"], 80 * squares(x))


def test_what_goes_wrong() -> None:
    with (
        pytest.raises(ValueError, match="Sequential has no linear layer"),
        isqtorch.calibrate(nn.Sequential(nn.ReLU())),
    ):
        pass
    with pytest.raises(ValueError, match="no layer of the model ran"), isqtorch.calibrate(mlp()):
        pass
    model = mlp()
    with isqtorch.calibrate(model), pytest.raises(ValueError, match="being calibrated already"):
        model(torch.ones(1, 256))
        with isqtorch.calibrate(model):
            pass
    with pytest.raises(ValueError, match=r"entry '1': value 0 is (inf|nan).*Run the model in bf16"):
        with isqtorch.calibrate(model):
            model[1](torch.full((1, 256), float("inf")))


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_overhead_of_watching() -> None:
    """Measured 1 to 8 %; the promise is below 15 %. CPU time, the least of many forwards: others share the machine."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(0, 2048, (1, 512))

    def fastest(seconds: list[float], runs: int = 4) -> None:
        for _ in range(runs):
            began = time.process_time()
            model(ids, use_cache=False)
            seconds.append(time.process_time() - began)

    plain: list[float] = []
    watched: list[float] = []
    with torch.no_grad():
        fastest([], 2)
        for _ in range(25):
            fastest(plain)
            with isqtorch.calibrate(model) as im:
                fastest(watched)
            assert isinstance(im, Calibration)
            if len(plain) >= 16 and min(watched) < 1.15 * min(plain):
                break
    overhead = min(watched) / min(plain) - 1
    print(f"watching costs {100 * overhead:.1f} % of {1e3 * min(plain):.1f} ms")
    assert overhead < 0.15
