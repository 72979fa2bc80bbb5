"""Packed weights cut for several processes: along rows anywhere, along columns on block borders."""

from __future__ import annotations

import copy
import os
import socket
from typing import Any

import pytest
import torch
from helpers import relative_error, weight
from torch import nn

import isqtorch
from isqtorch.formats import QuantFormat
from isqtorch.modules import QuantLinear


def layer(fmt: QuantFormat) -> QuantLinear:
    linear = nn.Linear(4 * fmt.block, 10)
    linear.weight.data = weight(fmt, rows=10)
    return QuantLinear.from_float(linear, fmt)


def test_rows_split_into_column_parallel_shards(fmt: QuantFormat) -> None:
    whole = layer(fmt)
    x = torch.randn(3, whole.in_features)
    shards = [QuantLinear.from_packed(part, fmt) for part in whole.weight.split(5)]
    assert torch.equal(torch.cat([shard(x) for shard in shards], dim=1) + whole.bias, whole(x))


def test_columns_split_on_block_borders_into_row_parallel_shards(fmt: QuantFormat) -> None:
    whole = layer(fmt)
    x = torch.randn(3, whole.in_features)
    half = whole.weight.shape[1] // 2
    left, right = (QuantLinear.from_packed(part, fmt) for part in whole.weight.split(half, dim=1))
    assert left.in_features == right.in_features == whole.in_features // 2
    parts = left(x[:, : left.in_features]) + right(x[:, left.in_features :]) + whole.bias
    assert relative_error(parts, whole(x)) < 1e-6
    with pytest.raises(ValueError, match=f"positive multiple of {fmt.block_bytes} bytes, got {half + 1}"):
        QuantLinear.from_packed(whole.weight.data[:, : half + 1], fmt)


def test_a_sharded_parameter_decides_k_not_in_features(fmt: QuantFormat) -> None:
    """Tensor parallelism replaces the parameter and leaves in_features alone."""
    whole = layer(fmt)
    whole.bias = None
    whole.weight = nn.Parameter(whole.weight.data[:, : whole.weight.shape[1] // 2].clone(), requires_grad=False)
    assert whole(torch.randn(2, whole.in_features // 2)).shape == (2, 10)


def _compare_train_step(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(100, 256), nn.Linear(256, 512), nn.LayerNorm(512), nn.Linear(512, 64))
    isqtorch.quantize_(model, 4, progress=False)
    ids = torch.tensor([[1, 2, 99]])
    sharded = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for module in sharded:
        fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert sharded[1].weight.to_local().shape == (256, model[1].weight.shape[1])
    got, want = sharded(ids), model(ids)
    assert torch.equal(got, want)
    got.square().mean().backward()
    want.square().mean().backward()
    torch.testing.assert_close(sharded[1].bias.grad.full_tensor(), model[1].bias.grad)
    torch.distributed.barrier()


def _report_train_step(rank: int, port: int, reports: Any) -> None:
    try:
        _compare_train_step(rank, port)
        reports.put(f"rank {rank}: equal")
    except BaseException as error:
        reports.put(f"rank {rank}: {type(error).__name__}: {error}")
    # Past Python's shutdown: gloo's threads may still let go of tensors then, which ends the process by
    # std::terminate, with destroy_process_group and without (pytorch/pytorch#179291, #190489).
    os._exit(0)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="FSDP2 of this torch refuses bytes")
def test_fsdp2_gathers_packed_parameters() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    processes = [context.Process(target=_report_train_step, args=(rank, port, reports)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.is_alive():
            process.kill()
    said = []
    while not reports.empty():
        said.append(reports.get())
    assert sorted(said) == ["rank 0: equal", "rank 1: equal"]
