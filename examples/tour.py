"""Every public function of isqtorch, once, on the demo model. Run it from a checkout: python examples/tour.py

Type checkers read it, too (`make lint`), so it shows which arguments the functions take.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import isqtorch

DEMO = Path(__file__).resolve().parent / "demo_model"
MODEL = str(DEMO / "model")


def load() -> torch.nn.Module:
    """The demo model with float weights."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    return model


def formats() -> None:
    """What formats there are, and what one does to a single weight."""
    print(isqtorch.__version__, ", ".join(isqtorch.formats()))
    fmt: isqtorch.QuantFormat = isqtorch.get_format("q4k")
    assert isqtorch.resolve_format(4, "cpu") is fmt
    weight = torch.randn(8, 512)
    blob: isqtorch.QuantizedTensor = isqtorch.quantize(weight, "afq4", importance=torch.ones(512), rule="search")
    print(blob, float((blob.dequantize(torch.float32) - weight).square().mean()))


def whole_model(folder: Path) -> None:
    """Predict, quantize, look at it, change it, and go back."""
    topology: isqtorch.Topology = isqtorch.Topology.load(
        {"0-2": "q6k", r"/mlp\.down_proj$/": 5, r"/layers\.7\./": None}
    )
    predicted: isqtorch.QuantReport = isqtorch.plan(MODEL, "q4k", topology=topology, organization="default")
    predicted.topology().save(folder / "topology.yaml")

    model = load()
    report = isqtorch.quantize_(
        model,
        "q4k",
        topology=folder / "topology.yaml",
        exclude=[r"layers\.6\."],
        fallback="up",
        device="cpu",
        progress=False,
        measure_error=True,
    )
    print(report)
    layer: isqtorch.LayerReport = report["model.layers.0.mlp.up_proj"]
    print(layer.stored, layer.bits_per_weight, layer.error)
    report.to_json()
    report.to_markdown()
    explanation: isqtorch.Explanation = isqtorch.explain(model)
    print(explanation)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(linear, isqtorch.QuantLinear)
    assert not any(isinstance(module, isqtorch.QuantExperts) for module in model.modules())
    assert any(isinstance(module, isqtorch.QuantEmbedding) for module in model.modules())
    optimization: isqtorch.Optimization = isqtorch.optimize_(model)
    print(optimization)

    isqtorch.checkpoint.save(model, folder / "model.safetensors")
    isqtorch.checkpoint.load_(load(), folder / "model.safetensors")
    isqtorch.requantize_(model, "q3k", fallback="skip", progress=False)
    isqtorch.requantize_(model, "fp8", source="stored", activations="fp8", topology={}, exclude=(), progress=False)
    isqtorch.dequantize_(model, torch.bfloat16)


def quality(folder: Path) -> None:
    """An importance matrix, formats chosen by measurement, and how good the model still is."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (DEMO / "calibration.txt").read_text(encoding="utf-8")[:2500]
    model = load()
    reference = isqtorch.reference_logits(model, text, tokenizer, context=128)
    collected: isqtorch.Calibration = isqtorch.collect_imatrix(model, text, tokenizer, chunk=128, progress=False)
    collected.save(folder / "demo.gguf")
    with isqtorch.calibrate(model) as seen:
        model(torch.arange(16)[None])
    assert set(seen) == set(collected)
    imatrix: isqtorch.Imatrix = isqtorch.read_imatrix(folder / "demo.gguf")
    moments: isqtorch.Moments = isqtorch.collect_moments(model, text, tokenizer, chunk=128, progress=False)
    moments.save(folder / "demo.safetensors")
    fed = isqtorch.quantize_(load(), "q4_0", rule="feedback", imatrix=folder / "demo.safetensors", progress=False)
    print(fed.notes)
    small = load()
    isqtorch.quantize_(small, "afq3", progress=False)
    refinement: isqtorch.Refinement = isqtorch.refine_(
        small, model, text=text, tokenizer=tokenizer, steps=2, batch=2, progress=False
    )
    print(refinement, refinement.after / refinement.before)
    report = isqtorch.quantize_(model, "auto", target_bpw=4.5, probe="output", imatrix=imatrix, progress=False)
    assert report.choice is not None
    score: isqtorch.Perplexity = isqtorch.perplexity(model, text, tokenizer, context=128, mode="global")
    divergence: isqtorch.KLResult = isqtorch.kl_divergence(model, reference, text, tokenizer, context=128)
    print(score, score.stderr, divergence, divergence.mean)


def while_loading(folder: Path) -> None:
    """Packed as it is read, saved, and loaded again."""
    config = isqtorch.IsqConfig("q4k", topology={"/down_proj$/": "q5k"}, organization="default", fallback="up")
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    model.save_pretrained(folder / "demo-4-bit")
    AutoModelForCausalLM.from_pretrained(folder / "demo-4-bit")


def one_way_in(folder: Path) -> None:
    """Any model with its tokenizer: a folder, a .gguf file, an MLX folder, or an id on the Hub."""
    loaded: isqtorch.Loaded = isqtorch.load(MODEL, "q4k", exclude="lm_head", progress=False, dtype="float32")
    loaded.model.save_pretrained(folder / "demo-q4k")
    loaded.tokenizer.save_pretrained(folder / "demo-q4k")
    model, tokenizer, report = isqtorch.load(folder / "demo-q4k")
    print(report.bits_per_weight, tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"))[0]))


def long_contexts() -> None:
    """Keys and values in half of the memory, for a reply and for what follows it."""
    model, tokenizer, _ = isqtorch.load(MODEL, "q4k", progress=False)
    cache = isqtorch.QuantizedCache(model.config, "q8_0/q4_0")
    out = model.generate(**tokenizer("The function", return_tensors="pt"), cache=cache, max_new_tokens=8)
    print(tokenizer.decode(out[0]), cache.get_seq_length(), cache.nbytes)
    model.generate(out, cache=cache, max_new_tokens=8)


def other_programs(folder: Path) -> None:
    """Files for llama.cpp and for MLX, with the same packed weights; `load` opens them again."""
    model, tokenizer, _ = isqtorch.load(MODEL, "q4k", progress=False)
    isqtorch.export_gguf(model, folder / "demo.q4k.gguf", tokenizer, name="Demo", pre_tokenizer="gpt-2")
    model, tokenizer, _ = isqtorch.load(MODEL, "afq4", progress=False)
    isqtorch.export_mlx(model, folder / "demo-mlx", tokenizer)
    for file in ("demo.q4k.gguf", "demo-mlx"):
        print(file, isqtorch.load(folder / file).report.bits_per_weight)


def metal() -> None:
    """On a Mac: compile every kernel, and name what the compiler refuses."""
    if torch.backends.mps.is_available():
        print(isqtorch.metal.check())


if __name__ == "__main__":
    formats()
    with tempfile.TemporaryDirectory() as scratch:
        whole_model(Path(scratch))
        quality(Path(scratch))
        while_loading(Path(scratch))
        one_way_in(Path(scratch))
        long_contexts()
        other_programs(Path(scratch))
    metal()
