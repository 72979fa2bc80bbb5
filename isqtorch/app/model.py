"""Loading a causal language model with transformers, quantized or not, and changing its format later.

A model is a folder or an id on the Hub. What is wrong with the request is said before anything slow happens, and a folder that
exists is never looked up on the Hub.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isqtorch import checkpoint
from isqtorch.auto import AUTO_OPTIONS, Budget
from isqtorch.files.checkpoints import opened
from isqtorch.formats import AUTO, mix_name, resolve_format
from isqtorch.importance.calibration import collect_imatrix
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.inplace.weights import STORED
from isqtorch.policy.options import Options
from isqtorch.policy.request import checked_device
from isqtorch.report.plan import plan
from isqtorch.report.report import QuantReport


class LoadedModel:
    """A causal language model with its tokenizer, which can change its format while it lives.

    Attributes:
        source: the folder or model id it came from.
        model, tokenizer: transformers' objects, the model in evaluation mode.
        isq: the format that was asked for last; None: the weights are as the checkpoint has them.
        packed: the checkpoint itself is quantized.
        report: of the last quantization; None: there was none.
        load_seconds: wall time of loading, quantizing included.
    """

    def __init__(
        self,
        source: str,
        isq: str | None = None,
        *,
        device: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a model.

        Args:
            source: a folder with config.json and safetensors, or a model id on the Hub.
            isq: quantize to this format or number of bits; None: leave the weights as they are.
            device: where the model runs; None: the CPU.
            options: more arguments of `quantize_` (topology, organization, imatrix or calibration_file, fallback, those for
                "auto"), kept for `requantize`. Calibration runs the unquantized model, which then has to fit into memory.

        Raises:
            ValueError: an unknown format, options without a format, or a checkpoint that is quantized already and a format.
            OSError: no such folder or model.
            ImportError: transformers or accelerate is missing.
        """
        self.source, self.isq, self.device, self.options = source, isq, device, dict(options or {})
        self.packed = check_request(source, isq, device, self.options)
        began = time.perf_counter()
        self.tokenizer = load_tokenizer(source)
        self.model, self.report = self._load(isq)
        self.load_seconds = time.perf_counter() - began

    @property
    def context(self) -> int | None:
        """The most tokens, prompt and reply together, that the model was made for; None: it has no such limit."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def check(self, isq: str) -> None:
        """ValueError if `requantize` would refuse this format."""
        check_format(isq, self.device)
        if mix_name(isq) == AUTO:
            check_budget(isq, self.options)

    def requantize(self, isq: str, source: str | None = None) -> QuantReport:
        """Change the format of the model.

        The weights are read from the checkpoint again, so that going to more bits gains what it should; the old and the new
        packed layers are in memory for a moment. If the checkpoint is itself quantized the stored weights are converted, and
        the report says so. Topology, importance and the other options stay in force. A model that was not quantized before is
        another object afterwards.

        Args:
            isq: the format or number of bits.
            source: where else the float weights are, or "stored"; see `isqtorch.requantize_`.

        Raises:
            ValueError, OSError: as for loading. The model is as it was.
        """
        self.check(isq)
        if (self.packed or self.report is not None) and mix_name(isq) != AUTO:
            if source is None and self.packed:
                source = STORED
            options = self._options(isq)
            if mix_name(isq) is not None or not resolve_format(isq, self.device or "cpu").activations:
                options.pop("activations", None)  # asked for with fp8; layers that stay in it keep theirs
            self.report = requantize_(self.model, isq, source=source, progress=False, **options)
        else:
            self.model, self.report = self._load(isq)
            gc.collect()  # the old model: its modules refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.isq = isq
        assert self.report is not None
        return self.report

    def _options(self, isq: str | None) -> dict[str, Any]:
        """The options that concern a format: "auto" has its own, and reads the calibration text again."""
        options = {name: value for name, value in self.options.items() if value is not None}
        if mix_name(isq) == AUTO:
            return options
        return {
            name: value
            for name, value in options.items()
            if name not in AUTO_OPTIONS and not (name == "calibration_file" and "imatrix" in options)
        }

    def _load(self, isq: str | None) -> tuple[Any, QuantReport | None]:
        options = self._options(isq)
        if isq is not None and "calibration_file" in options:
            return self._calibrated(isq, options)
        model = load_causal_lm(self.source, isq, device=self.device, options=options)
        return model, model.isq_report if isq is not None else None

    def _calibrated(self, isq: str, options: dict[str, Any]) -> tuple[Any, QuantReport]:
        """The float model, run on a text and quantized with what that showed, which later changes of the format use as well."""
        model = load_causal_lm(self.source, device=self.device)
        text = Path(options.pop("calibration_file"))
        asked = {name: value for name, value in options.items() if name not in ("imatrix", *AUTO_OPTIONS)}
        if mix_name(isq) != AUTO:
            plan(model, isq, **asked)  # faults show before the minutes
        if "imatrix" not in options:
            options["imatrix"] = collect_imatrix(model, text, self.tokenizer)
        self.options["imatrix"] = options["imatrix"]
        if mix_name(isq) == AUTO:
            options |= {"calibration_file": text, "tokenizer": self.tokenizer}
        return model, quantize_(model, isq, **options)


def load_causal_lm(
    source: str, isq: str | None = None, *, device: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """A causal language model in evaluation mode; see `LoadedModel`.

    With a format each weight is packed as it is read. A folder that `isqtorch.checkpoint.save` wrote is built from its
    configuration and then filled with the packed weights.
    """
    with needs_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    check_folder(source)
    settings: dict[str, Any] = {} if device is None else {"device_map": device}
    with _from_hub(source):
        config = AutoConfig.from_pretrained(source)
        if isq is not None:
            method = _quantized_by(config)
            if method is not None:
                raise _already(source, method)
            options = {name: value for name, value in (options or {}).items() if value is not None}
            from isqtorch.integrations.transformers import IsqConfig

            settings["quantization_config"] = IsqConfig(isq, **options)
        if not _has_own_header(source):
            return AutoModelForCausalLM.from_pretrained(source, dtype="auto", **settings).eval()
        from accelerate import init_empty_weights

        with init_empty_weights():  # buffers, which no file has, are real
            model = AutoModelForCausalLM.from_config(config)
        checkpoint.load_(model, Path(source))
        return model.eval() if device is None else model.eval().to(device)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model."""
    with needs_transformers():
        from transformers import AutoTokenizer

    check_folder(source)
    with _from_hub(source):
        return AutoTokenizer.from_pretrained(source)


def check_format(isq: str, device: str | None = None) -> None:
    """ValueError that lists what exists, unless `isq` is a format, a number of bits, or a rule for whole models."""
    if mix_name(isq) is None:
        resolve_format(isq, torch.device(device or "cpu"))


def check_request(
    source: str, isq: str | None, device: str | None = None, options: Mapping[str, Any] | None = None
) -> bool:
    """What can be wrong with a request to load and can be known before anything slow; see `LoadedModel`.

    Returns:
        Whether MODEL is a folder with a quantized checkpoint.
    """
    check_folder(source)
    if device is not None:
        checked_device(device, "device")
    text = (options or {}).get("calibration_file")
    if text is not None and not Path(text).is_file():
        raise FileNotFoundError(f"no calibration text {text}")
    method = packed_by(source)
    if isq is not None:
        check_format(isq, device)
        check_budget(isq, options or {})
        if mix_name(isq) != AUTO and text is not None and (options or {}).get("imatrix") is not None:
            raise ValueError("give either imatrix or calibration_file, not both")
        if method is not None:
            raise _already(source, method)
    elif any(
        (options or {}).get(name)
        for name in ("topology", "imatrix", "calibration_file", "rule", "activations", *AUTO_OPTIONS)
    ):
        raise ValueError(
            "--topology, --imatrix, --calibration-file, --rule, --activations and the options of auto need --isq FORMAT"
        )
    return method is not None


def check_budget(isq: str, options: Mapping[str, Any]) -> Budget | None:
    """What "auto" is allowed, checked; None for other formats."""
    given: dict[str, Any] = {name: options.get(name) for name in AUTO_OPTIONS}
    return Budget.of("--isq", isq, Options(**given))


def packed_by(source: str) -> str | None:
    """The quantization method of the checkpoint in a folder; None: it is not quantized, or not a folder here."""
    if not os.path.isdir(source):
        return None
    if _has_own_header(source):
        return "isq"
    with needs_transformers():
        from transformers import AutoConfig

    return _quantized_by(AutoConfig.from_pretrained(source))


def _quantized_by(config: Any) -> str | None:
    """The method that a model's configuration says it is quantized with."""
    found = getattr(config.get_text_config(), "quantization_config", None) or getattr(
        config, "quantization_config", None
    )
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def _already(source: str, method: str) -> ValueError:
    by = "" if method == "isq" else f" (by {method})"
    return ValueError(f"{source} is quantized already{by}; leave out --isq, or give the original model")


def check_folder(source: str) -> None:
    """A path that does not exist would be looked up on the Hub, with a confusing message."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).is_dir():
        raise FileNotFoundError(f"no folder {source}: give a folder with config.json and safetensors, or a model id")
    if os.path.isdir(source) and not Path(source, "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: it is not a model folder")


def _has_own_header(source: str) -> bool:
    """Whether a folder's weights were written by `isqtorch.checkpoint.save`, whose header transformers does not know."""
    path = Path(source, "model.safetensors")
    if not path.is_file():
        return False
    with opened(path, "np") as file:
        return "isqtorch" in (file.metadata() or {})


@contextmanager
def needs_transformers() -> Iterator[None]:
    """Turn a missing transformers into one line that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError("this command loads models with transformers: pip install 'isqtorch[hf]'") from error


@contextmanager
def _from_hub(source: str) -> Iterator[None]:
    """Say in one line why a model id cannot be loaded; errors of a folder speak for themselves."""
    try:
        yield
    except OSError as error:
        if os.path.isdir(source):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(
            f"cannot load {source!r}: there is no such folder here, and the Hub or its local cache does not give it ({reason}). "
            "Check the name and the connection, or give a local folder."
        ) from error
