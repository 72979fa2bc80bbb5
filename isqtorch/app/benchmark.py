"""Measure speed of prefill and decoding, and peak memory, of one model in this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from isqtorch.files import system
from isqtorch.formats import mix_name, resolve_format
from isqtorch.modules import PackedModule

from .model import LoadedModel


@dataclass
class ModelSpeed:
    """The results for one model. Speeds are medians over the repeats of greedy `generate` with one sequence."""

    model: str
    isq: str | None
    format: str  # the requested format; without one, the format or type of the weights
    bytes: int  # size of all weights and buffers; shared ones count once
    load_seconds: float  # includes quantizing
    peak_bytes: int  # peak memory, minus the memory of the process before loading
    peak_kind: str  # "resident memory" of the process, or "GPU memory"
    prompt_len: int
    gen_len: int
    prefill: float  # prompt tokens / seconds until the first new token
    decode: float  # new tokens / second, without the first
    prefill_range: tuple[float, float]  # slowest and fastest repeat
    decode_range: tuple[float, float]
    roofline: dict[str, Any] | None = None  # of `Roofline.to_dict`, if it was asked for

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_model(
    source: str,
    isq: str | None,
    *,
    prompt_len: int = 512,
    gen_len: int = 128,
    repeat: int = 3,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
    kv: tuple[str, str] | None = None,
    roofline: bool = False,
) -> ModelSpeed:
    """Load a model and time it on random tokens. The peak memory is only meaningful in a fresh process.

    Args:
        source, isq, device, options, kv: see `LoadedModel`.
        prompt_len, gen_len: number of tokens; gen_len must be 2 or more.
        repeat: number of timed runs, after one warm-up run.
        roofline: whether to measure the parts of a token and the speed of memory, too.

    Raises:
        ValueError: prompt and reply exceed the context; or as for loading.
    """
    import transformers.generation  # noqa: F401  # imported now, so that its memory and time do not count for the model

    before, gpu = resident_bytes(), device is not None and torch.device(device).type == "cuda"
    loaded = LoadedModel(source, isq, need="answers", command="bench", device=device, options=options, kv=kv, fast=True)
    model, context = loaded.model, loaded.context
    if context is not None and prompt_len + gen_len > context:
        raise ValueError(f"{prompt_len} + {gen_len} tokens are more than {source}'s context of {context}")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt_len), generator=generator).to(model.device)

    timed_generate(
        model, ids, 2, loaded.new_cache()
    )  # warm-up: threads start, and memory is touched for the first time
    runs = [timed_generate(model, ids, gen_len, loaded.new_cache()) for _ in range(repeat)]
    prefill = [prompt_len / first for first, _ in runs]
    decode = [(gen_len - 1) / rest for _, rest in runs]
    peak = torch.cuda.max_memory_allocated() if gpu else peak_resident_bytes() - before
    found = None
    if roofline:
        from .roofline import measure_roofline

        # As many tokens as the context of a reply's token has on average.
        before_it = ids.repeat(1, 1 + gen_len // prompt_len)[:, : prompt_len + gen_len // 2]
        found = measure_roofline(model, before_it, 1 / statistics.median(decode), loaded.new_cache).to_dict()
    return ModelSpeed(
        model=source,
        isq=isq,
        format=_format(loaded),
        bytes=model_bytes(model),
        load_seconds=loaded.load_seconds,
        peak_bytes=peak,
        peak_kind="GPU memory" if gpu else "resident memory",
        prompt_len=prompt_len,
        gen_len=gen_len,
        prefill=statistics.median(prefill),
        decode=statistics.median(decode),
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        roofline=found,
    )


def timed_generate(
    model: Any, ids: torch.Tensor, new: int, cache: Mapping[str, Any] = MappingProxyType({})
) -> tuple[float, float]:
    """Seconds until the first of `new` tokens, and from the first to the last; `cache`: see `LoadedModel.new_cache`."""
    stamps: list[float] = []

    class Stamp:
        def put(self, _: Any) -> None:  # called with the prompt, then with each token on the CPU, so the device is done
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    began = time.perf_counter()
    mask = torch.ones_like(ids)
    # No token ends the reply. A least number of tokens would do that, too, but it searches the vocabulary at each token.
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "eos_token_id": None}
    model.generate(ids, attention_mask=mask, streamer=Stamp(), **settings, **cache)
    assert len(stamps) == new + 1, f"{len(stamps) - 1} tokens instead of {new}"
    return stamps[1] - began, stamps[-1] - stamps[1]


def _format(loaded: LoadedModel) -> str:
    if loaded.isq is not None:
        return mix_name(loaded.isq) or resolve_format(loaded.isq, loaded.device or "cpu").name
    names = sorted({module.format for module in loaded.model.modules() if isinstance(module, PackedModule)})
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return "+".join(names) or dtype.replace("bfloat16", "bf16").replace("float", "f")


def model_bytes(model: torch.nn.Module) -> int:
    """Size of all parameters and buffers in bytes; shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def resident_bytes() -> int:
    """Resident memory of this process in bytes; on other systems than Linux its peak so far; 0 if nothing says it."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes; 0 if nothing says it. Linux's getrusage includes the parent's at the fork."""
    return _status("VmHWM") or system.peak_resident_bytes() or 0


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None  # not Linux
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
