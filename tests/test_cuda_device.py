"""What only a GPU can show: graphs, streams, devices, compiling. `tests/test_cuda_ops.py` runs there too, with `-m cuda`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import ALL_FORMATS, DTYPES, FORMATS, ROUNDING, LinearCase, weight
from torch import Tensor, nn

import isqtorch
from isqtorch import ops
from isqtorch.cli import doctor
from isqtorch.formats import QuantFormat

pytestmark = pytest.mark.cuda

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
def test_doctor_agrees(fmt: QuantFormat) -> None:
    found = doctor.check_kernels(fmt, "cuda")
    assert found["ok"] and found["kernel"] == "native", found


@every_format
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 40, 130, 512, 513])
def test_linear_of_a_layer(fmt: QuantFormat, m: int) -> None:
    """Larger than what the emulator has time for: many blocks, odd n, several chunks for each warp."""
    packed = ops.quantize(weight(fmt, rows=1003, blocks=4096 // fmt.block), fmt.name)
    for dtype in DTYPES:
        x = torch.randn(m, 4096).to(dtype)
        y = ops.linear(x.cuda(), packed.cuda(), fmt.name)
        assert torch.equal(y, ops.linear(x.cuda(), packed.cuda(), fmt.name))  # the same in every run
        assert LinearCase.of(x, packed, fmt).error(y.cpu()) < fmt.linear_error + 2 * ROUNDING[dtype]


@every_format
def test_quantize_gives_the_cpus_bytes(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=301, blocks=2048 // fmt.block)
    importance = torch.rand(2048) + 0.1
    for vector in (None, importance):
        got = ops.quantize(w.cuda(), fmt.name, None if vector is None else vector.cuda()).cpu()
        differing = float((got != ops.quantize(w, fmt.name, vector)).double().mean())
        assert differing <= (0.001 if fmt.solver == "hqq" else 0), differing


# ---- graphs and streams -----------------------------------------------------------------------------------------------


def replayed(step: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """What a captured step gives for other values than those it was captured with, and what it should give."""
    x = first.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    x.copy_(second)
    graph.replay()
    return y.clone(), step(second)


@every_format
@pytest.mark.parametrize("m", [1, 8, 33, 600])
def test_a_graph_captures_linear(fmt: QuantFormat, m: int) -> None:
    packed = ops.quantize(weight(fmt, rows=65, blocks=4).cuda(), fmt.name)
    bias = torch.randn(65, device="cuda").bfloat16()
    first, second = torch.randn(2, m, 4 * fmt.block, device="cuda").bfloat16()
    got, want = replayed(lambda x: ops.linear(x, packed, fmt.name, bias), first, second)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_graph_captures_a_decode_step(tokens: int) -> None:
    """Embedding, experts that depend on the token, head: ids are read on the device only."""
    table = ops.quantize(torch.randn(100, 256).cuda(), "q6k")
    experts = ops.quantize(torch.randn(8, 64, 256).cuda(), "q4k")
    head = ops.quantize(torch.randn(100, 64).cuda(), "q8_0")

    def step(ids: Tensor) -> Tensor:
        x = ops.embedding(ids, table, "q6k", torch.bfloat16)
        chosen = torch.stack([ids % 9, (ids + 3) % 9], -1)  # 8 stands for an expert that is not here
        return ops.linear(ops.experts_linear(x, experts, "q4k", chosen).sum(1), head, "q8_0")

    first, second = torch.randint(100, (2, tokens), device="cuda")
    got, want = replayed(step, first, second)
    assert torch.equal(got, want)


def test_kernels_run_on_the_current_stream() -> None:
    """Work waits for what its stream was given before, not for another stream."""
    fmt = FORMATS[0]
    packed = ops.quantize(weight(fmt, rows=64, blocks=8).cuda(), fmt.name)
    x, later = torch.zeros(2, 4, 8 * fmt.block, device="cuda")
    later.normal_()
    want = ops.linear(later, packed, fmt.name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(later)
        y = ops.linear(x, packed, fmt.name)
    stream.synchronize()
    assert torch.equal(y, want)


def test_nothing_waits_for_the_device() -> None:
    fmt = FORMATS[0]
    packed = ops.quantize(weight(fmt, rows=64, blocks=8).cuda(), fmt.name)
    stack, ids = packed.view(4, 16, -1), torch.zeros(4, 2, dtype=torch.long, device="cuda")
    x = torch.randn(600, 8 * fmt.block, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for m in (1, 8, 100, 600):
            ops.linear(x[:m], packed, fmt.name)
        ops.dequantize(packed, fmt.name, torch.float16)
        ops.embedding(ids, packed, fmt.name, torch.float16)
        ops.experts_linear(x[:4], stack, fmt.name, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- devices ----------------------------------------------------------------------------------------------------------


def test_tensors_of_several_devices_are_refused() -> None:
    packed = ops.quantize(torch.randn(8, 64), "q4_0")
    x, ids = torch.zeros(2, 64), torch.zeros(2, 1, dtype=torch.long)
    for call, message in (
        (lambda: ops.linear(x, packed.cuda(), "q4_0"), "linear: x is on cpu, the weight on cuda:0. Move one of them."),
        (lambda: ops.linear(x.cuda(), packed, "q4_0"), "linear: x is on cuda:0, the weight on cpu. Move one of them."),
        (
            lambda: ops.linear(x.cuda(), packed.cuda(), "q4_0", torch.zeros(8)),
            "linear: bias is on cpu, the weight on cuda:0. Move one of them.",
        ),
        (
            lambda: ops.embedding(ids, packed.cuda(), "q4_0", torch.float32),
            "embedding: ids are on cpu, the weight on cuda:0. Move one of them.",
        ),
        (
            lambda: ops.experts_linear(x.cuda(), packed.view(2, 4, -1).cuda(), "q4_0", ids),
            "experts_linear: ids are on cpu, the weight on cuda:0. Move one of them.",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == message


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    fmt = FORMATS[0]
    w, x = weight(fmt), torch.randn(3, 4 * fmt.block)
    packed = ops.quantize(w.to("cuda:1"), fmt.name)
    assert packed.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    y = ops.linear(x.to("cuda:1"), packed, fmt.name)
    assert torch.equal(y.cpu(), ops.linear(x.cuda(), packed.cuda(0), fmt.name).cpu())


# ---- models -----------------------------------------------------------------------------------------------------------


def test_a_quantized_model_compiles_into_one_graph() -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().bfloat16()
    isqtorch.quantize_(model, "q4k")
    x = torch.randn(3, 256, device="cuda").bfloat16()
    with torch.no_grad():
        want = model(x)
        for mode in (None, "reduce-overhead"):
            compiled = torch.compile(model, fullgraph=True, mode=mode)
            for _ in range(3):
                got = compiled(x).clone()
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("m", [5, 600])
def test_gradients_flow_to_x(m: int) -> None:
    packed = ops.quantize(torch.randn(64, 256).cuda(), "q4k")
    x = torch.randn(m, 256, device="cuda", requires_grad=True)
    ops.linear(x, packed, "q4k").square().sum().backward()
    w = ops.dequantize(packed, "q4k", torch.float32)
    want = 2 * (x.detach() @ w.t()) @ w
    assert float((x.grad - want).norm() / want.norm()) < 0.02


def test_generate_with_optimize_gives_the_same_text() -> None:
    pytest.importorskip("transformers")
    from models import tiny_llama

    model = tiny_llama(dtype=torch.float32).cuda()
    isqtorch.quantize_(model, "q8_0")
    prompt = torch.arange(3, 12, device="cuda")[None]

    def reply() -> list[int]:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        return out[0].tolist()

    text = reply()
    assert isqtorch.optimize_(model).changes
    assert reply() == text and reply() == text
    isqtorch.optimize_(model, False)
    assert reply() == text
