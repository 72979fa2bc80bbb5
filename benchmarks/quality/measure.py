"""Quantizes a model in one way after the other and measures each against the model as it is."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isqtorch
from isqtorch.cli._common import read_text
from isqtorch.cli.demo import model_size
from isqtorch.evaluation import Recorded
from isqtorch.running import token_ids

from .rows import Row


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    model: str  # folder or id
    text: Path  # held out
    calibration: Path  # a text, or an importance matrix file
    context: int  # tokens per window
    tokens: int  # of the held-out text
    dtype: str  # what the model computes in; "auto": as its checkpoint says


@dataclass
class Quality:
    """One row of the table. Divergences are KL(unquantized || quantized) in nats."""

    spec: str
    how: str  # Row.how
    size: int  # bytes of all parameters and saved buffers
    bits_per_weight: float  # of the whole model, norms included
    perplexity: float
    kl: float = 0.0  # mean
    kl_p99: float = 0.0
    top1: float = 100.0  # %
    seconds: float = 0.0  # to quantize
    stored: dict[str, int] = field(default_factory=dict)  # format -> number of layers


@dataclass
class Results:
    """The unquantized model first, then every row; what failed and why; facts about the run."""

    rows: list[Quality] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        return cls([Quality(**row) for row in data["rows"]], data["skipped"], data["facts"])


class Session:
    """One model with its held-out ids, the importance matrix and the logits that all rows are compared with.

    The model is loaded again for every row, so that no two are in memory at a time.
    """

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoTokenizer

        self.settings, self.results = settings, Results()
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model)
        text = read_text(str(settings.text))[: 16 * settings.tokens]  # no tokenizer makes fewer tokens of so much
        self.ids: Tensor = token_ids(text, self.tokenizer, "quality")[: settings.tokens]
        model = self._load()
        self.numel = model_size(model)[1]
        self.reference = isqtorch.reference_logits(model, self.ids, self.tokenizer, context=settings.context)
        self.imatrix = self._importance(model)
        base = Recorded(self.reference)
        tokens = getattr(self.imatrix, "tokens", None)  # a file does not say
        score = isqtorch.perplexity(base, self.ids, self.tokenizer, context=settings.context)
        name = str(model.dtype).removeprefix("torch.")
        size = model_size(model)[0]
        self.results.rows.append(Quality(name, "", size, 8 * size / self.numel, float(score)))
        self.results.facts = {
            "tokens": len(self.ids),
            "scored": score.tokens,
            "perplexity_stderr": score.stderr,
            "calibrated": settings.calibration.name + (f", {tokens} tokens" if tokens else ""),
        }

    def measure(self, row: Row) -> Quality | None:
        """Add one row; None, and a reason in `skipped`, where quantize_ refuses it."""
        model = self._load()
        began = time.perf_counter()
        options: dict[str, Any] = {
            **row.options,
            "rule": row.rule,
            **({"imatrix": self.imatrix} if row.imatrix else {}),
        }
        try:
            report = isqtorch.quantize_(model, row.spec, progress=False, **options)
        except (ValueError, TypeError) as error:  # TypeError: an option that this version does not have
            self.results.skipped[row.name] = str(error)
            return None
        seconds = time.perf_counter() - began
        logits = isqtorch.reference_logits(model, self.ids, self.tokenizer, context=self.settings.context)
        context = self.settings.context
        divergence = isqtorch.kl_divergence(Recorded(logits), self.reference, self.ids, self.tokenizer, context=context)
        stored: dict[str, int] = {}
        for layer in report.layers:
            if layer.stored and layer.tied_to is None:
                stored[layer.stored] = stored.get(layer.stored, 0) + 1
        size = model_size(model)[0]
        found = Quality(
            spec=row.spec,
            how=row.how,
            size=size,
            bits_per_weight=8 * size / self.numel,
            perplexity=float(isqtorch.perplexity(Recorded(logits), self.ids, self.tokenizer, context=context)),
            kl=divergence.mean,
            kl_p99=divergence.p99,
            top1=divergence.top1_agreement,
            seconds=seconds,
            stored=stored,
        )
        self.results.rows.append(found)
        return found

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        dtype = self.settings.dtype
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        return AutoModelForCausalLM.from_pretrained(self.settings.model, dtype=wanted).eval()

    def _importance(self, model: Any) -> isqtorch.Imatrix:
        path = self.settings.calibration
        if path.suffix in (".imatrix", ".dat", ".gguf", ".cimatrix"):
            return isqtorch.read_imatrix(path).for_model(model)
        return isqtorch.collect_imatrix(model, path, self.tokenizer, chunk=self.settings.context, progress=False)
