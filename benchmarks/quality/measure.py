"""Quantizes a model in one way after the other and measures each against the model as it is."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import isqtorch
from isqtorch.cli._common import read_text
from isqtorch.cli.demo import model_size
from isqtorch.formats import AUTO

from .judges import Judge, Score, SentenceJudge, TextJudge
from .originals import Original, is_language_model
from .packages import sha256
from .rows import Row

KL, COSINE = "KL", "1 - cosine"
_IMATRIX_FILES = (".imatrix", ".dat", ".gguf", ".cimatrix")


@dataclass(frozen=True)
class Settings:
    """What is measured, and on what."""

    model: str  # file, folder or id
    texts: tuple[Path, ...]  # held out
    calibration: Path  # a text, or an importance matrix file
    context: int  # tokens per window, or most tokens of a sentence
    tokens: int  # of each held-out text
    dtype: str  # what the model computes in; "auto": as its checkpoint says


@dataclass
class Quality:
    """One row of the tables: how a model was quantized, and a score on each text."""

    spec: str
    how: str  # Row.how
    size: int  # bytes of all parameters and saved buffers
    bits_per_weight: float  # of the whole model, norms included
    scores: list[Score]
    seconds: float = 0.0  # to quantize
    stored: dict[str, int] = field(default_factory=dict)  # format -> number of layers
    commit: str = ""  # of isqtorch; "" in results older than this field

    @property
    def name(self) -> str:
        """As in `Row.name`."""
        return "+".join(filter(None, [self.spec, self.how]))


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
        """The inverse of `to_json`; ValueError for results of another version."""
        try:
            rows = [Quality(**row | {"scores": [Score(**score) for score in row["scores"]]}) for row in data["rows"]]
            return cls(rows, data["skipped"], data["facts"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"these results are of another version of the benchmark: {error}") from None

    def rows_of(self, earlier: Results) -> dict[str, Quality]:
        """The rows of an earlier run, by name, but for its original.

        Raises:
            ValueError: it measured something else: another model or precision, other texts, windows or calibration.
        """
        for fact in ("name", "note", "measure", "context", "texts", "calibrated", "kernels", "torch"):
            ours, theirs = self.facts[fact], earlier.facts.get(fact)
            if ours != theirs:
                raise ValueError(f"the results to go on with have another {fact}: {theirs}, and this run has {ours}")
        ours_of, theirs_of = self.rows[0], earlier.rows[0]
        if ours_of.spec != theirs_of.spec or [s.count for s in ours_of.scores] != [s.count for s in theirs_of.scores]:
            raise ValueError("the results to go on with have another precision, or another number of tokens")
        return {row.name: replace(row, commit=row.commit or earlier.facts["commit"]) for row in earlier.rows[1:]}


class Session:
    """One model with its importance matrix, and a judge for each text. The model is loaded once; rows quantize copies."""

    def __init__(self, settings: Settings) -> None:
        self.results = Results()
        self.seconds = 0.0  # that the last row took in all
        original = Original.load(settings.model, settings.dtype)
        self.model, tokenizer = original.model, original.tokenizer
        size, self.numel = model_size(self.model)
        causal = is_language_model(self.model)
        kind = TextJudge if causal else SentenceJudge
        self.judges: list[Judge] = [
            kind(path.name, self.model, read_text(str(path)), tokenizer, settings.context, settings.tokens)
            for path in settings.texts
        ]
        self.settings, self.tokenizer = settings, tokenizer
        self.imatrix = self._importance(settings, tokenizer)
        self._moments: isqtorch.Moments | None = None
        calibrated = getattr(self.imatrix, "tokens", None)  # a file does not say
        dtype = str(self.model.dtype).removeprefix("torch.")
        scores = [judge.original for judge in self.judges]
        self.results.rows.append(Quality(dtype, "", size, 8 * size / self.numel, scores))
        self.results.facts = {
            "measure": KL if causal else COSINE,
            "note": original.note,
            "context": settings.context,
            "texts": {path.name: sha256(path) for path in settings.texts},
            "calibrated": settings.calibration.name + (f", {calibrated} tokens" if calibrated else ""),
        }

    def measure(self, row: Row) -> Quality | None:
        """Add one row; None, and a reason in `skipped`, where quantize_ refuses it."""
        model = copy.deepcopy(self.model)
        began = time.perf_counter()
        options: dict[str, Any] = {**row.options, "rule": row.rule}
        steps = options.pop("refine", None)  # of refine_, not of quantize_
        try:
            if row.imatrix:
                options["imatrix"] = self.moments if row.rule == "feedback" else self.imatrix
                began = time.perf_counter()  # the statistics are collected once for all rows
                if row.spec == AUTO and self._is_text and self.results.facts["measure"] == KL:
                    options |= {"calibration_file": self.settings.calibration, "tokenizer": self.tokenizer}
            report = isqtorch.quantize_(model, row.spec, progress=False, **options)
            if steps is not None:
                text, tokenizer = self.settings.calibration, self.tokenizer
                isqtorch.refine_(model, self.model, text=text, tokenizer=tokenizer, steps=steps, progress=False)
        except (ValueError, TypeError) as error:  # TypeError: an option that this version does not have
            self.results.skipped[row.name] = str(error)
            return None
        seconds = time.perf_counter() - began
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
            scores=[judge(model) for judge in self.judges],
            seconds=seconds,
            stored=stored,
            commit=self.results.facts["commit"],
        )
        self.results.rows.append(found)
        self.seconds = time.perf_counter() - began
        return found

    @property
    def _is_text(self) -> bool:
        """Whether the calibration is a text, and not an importance matrix."""
        return self.settings.calibration.suffix not in _IMATRIX_FILES

    @property
    def moments(self) -> isqtorch.Moments:
        """The second moments for `rule="feedback"`, from the calibration text that the importance matrix is from."""
        if self._moments is None:
            path = self.settings.calibration
            if not self._is_text:
                raise ValueError(f"feedback needs a calibration text, and {path.name} is an importance matrix")
            context = self.settings.context
            self._moments = isqtorch.collect_moments(self.model, path, self.tokenizer, chunk=context, progress=False)
        return self._moments

    def _importance(self, settings: Settings, tokenizer: Any) -> isqtorch.Imatrix:
        path = settings.calibration
        if not self._is_text:
            return isqtorch.read_imatrix(path).for_model(self.model)
        return isqtorch.collect_imatrix(self.model, path, tokenizer, chunk=settings.context, progress=False)
