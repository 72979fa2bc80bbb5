"""Loading in several threads: the classes of torch are shared by all of them."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from torch import nn

import isqtorch
from tests.integrations.gguf_models import tiny_model, write_model
from tests.models import state_bytes


def test_threads_that_load_leave_the_others_alone(tmp_path: Path) -> None:
    """A layer that another thread makes meanwhile has values, and so has every later one."""
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), metadata={"tokenizer.ggml.pre": "gpt-2"})
    expected = state_bytes(isqtorch.load(path).model)
    registers = nn.Module.register_parameter
    loaded: list[object] = []
    stop = threading.Event()
    wrong: list[str] = []

    def load() -> None:
        for _ in range(3):
            loaded.append(state_bytes(isqtorch.load(path).model))

    def make() -> None:
        while not stop.is_set():
            if nn.Linear(2, 2).weight.device.type != "cpu":
                wrong.append("a layer of another thread is on meta")
                return

    maker = threading.Thread(target=make)
    loaders = [threading.Thread(target=load) for _ in range(3)]
    for thread in (maker, *loaders):
        thread.start()
    for thread in loaders:
        thread.join()
    stop.set()
    maker.join()
    assert not wrong
    assert len(loaded) == 9 and all(each == expected for each in loaded)
    assert nn.Module.register_parameter is registers
    assert nn.Linear(2, 2).weight.device == torch.device("cpu")
