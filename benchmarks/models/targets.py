"""The targets for whole models, and whether the measurements meet them."""

from __future__ import annotations

from ..targets import Target
from .checkpoints import REAL
from .engines import BF16, LLAMA_CPP, LLAMA_CPPS, MISTRAL_RS, TRANSFORMERS
from .results import ModelResults, Run

PROMPTS = (128, 512)  # tokens; a reply follows the first
JUDGED = "q4k"  # the format of which most is asked
OVER_LLAMA_CPP = {
    "llama q4k": 1.5,
    "llama q8_0": 1.3,
    "moe q4k": 1.2,
    "moe q8_0": 1.2,
    "smollm2 q4k": 0.8,
    "smollm2 q8_0": 0.8,
}
OVER_MISTRAL_RS = ("smollm2 q8_0", "smollm2 q4k")


def judge(results: ModelResults) -> list[Target]:
    """All targets. A model that was not measured says why in its row."""
    peaks = {
        model: Target(
            f"peak memory while loading, {model} at {JUDGED}", "packed size", 1.10, at_most=True, percent=True
        )
        for model in ("llama", "moe")
    }
    reload = Target("loading a packed checkpoint", "wall time", 1.0, at_most=True, unit=" s")
    anonymous = Target("anonymous memory of a packed checkpoint", "its size", 0.05, at_most=True, percent=True)
    load = Target("load and quantize", "the longer of reading and quantizing alone", 1.3, at_most=True)
    overhead = Target("QuantLinear", "its operator alone", 3.0, at_most=True, unit=" us")
    bf16 = Target(f"decoding, llama at {JUDGED}", "bf16, same run", 2.5)
    memory = Target("decoding, llama", "read bandwidth, same run", 0.8, percent=True)
    other = Target("decoding", "llama.cpp, same weights, same run, whichever way its threads wait", 1.0)
    mistral = Target("decoding, smollm2", "mistral.rs, same run", 1.2)
    packing = Target("packing while loading, smollm2", "wall time", 1.0, at_most=True, unit=" s")

    for run in results.ours():
        peak = peaks.get(run.model)
        if peak and run.format == JUDGED and run.peak:
            peak.ratios[run.name] = run.peak["total"] / run.size
        if run.reload:
            reload.ratios[run.name] = min(run.reload)
            if run.reload_peak and run.model not in REAL:  # a few megabytes are fixed costs
                anonymous.ratios[run.name] = run.reload_peak["anonymous"] / run.size
            if run.identical is False:
                reload.failed.append(f"{run.name}: other weights than were saved")
        ratio = run.load_ratio()
        if ratio is not None and run.model not in REAL:  # the time of a small model has a target of its own
            load.ratios[run.name] = ratio
        if (run.model, run.format) == ("llama", JUDGED):
            _compare(bf16, run, results.beside(run, TRANSFORMERS, BF16))
        if run.model == "llama" and run.bandwidth_share is not None:
            if run.alone:
                memory.ratios[run.name] = run.bandwidth_share
            else:
                memory.left_out.append(run.name)
        theirs = [found for who in LLAMA_CPPS if (found := results.beside(run, who)) and found.decode_rate]
        fastest = max(theirs, key=lambda found: found.decode_rate or 0.0, default=None)
        _compare(other, run, fastest)
        if run.name in other.ratios and run.bandwidth_share:
            # No program can be faster than its weights are read.
            other.limits[run.name] = other.ratios[run.name] / run.bandwidth_share
        if run.name in OVER_MISTRAL_RS:
            _compare(mistral, run, results.beside(run, MISTRAL_RS))
        if run.load_gguf:
            packing.ratios[run.name] = run.load[0]  # the first is what a user waits for
            packing.ratios[f"{run.name} from GGUF"] = run.load_gguf[0]
    other.needs = {name: need for name, need in OVER_LLAMA_CPP.items() if name in other.ratios}
    overhead.ratios = {fmt: found["microseconds"] for fmt, found in results.overhead.items()}

    for what, why in results.skipped.items():
        if what == f"moe isqtorch {JUDGED}":
            peaks["moe"].missing.append(why)
        if what == LLAMA_CPP:
            other.missing.append(why)
        if what == MISTRAL_RS:
            mistral.missing.append(why)
    return [*peaks.values(), reload, anonymous, load, packing, overhead, memory, bf16, other, mistral]


def _compare(target: Target, run: Run, other: Run | None) -> None:
    """How many times as fast we decode, where both had the machine."""
    if other and run.decode_rate and other.decode_rate:
        if run.alone and other.alone:
            target.ratios[run.name] = run.decode_rate / other.decode_rate
        else:
            target.left_out.append(run.name)
