"""Load a causal language model with transformers, quantized or not, and change its format later.

A model is a folder or an id on the Hub. Requests are checked before anything slow happens. An existing folder is never
looked up on the Hub.
"""

from __future__ import annotations

import gc
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from isqtorch import checkpoint
from isqtorch.auto import AUTO_OPTIONS, Budget
from isqtorch.files.binary import regular
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

from .classes import causal_class, described, not_causal, other_class

_NO_CODE = {"trust_remote_code": False}  # unless it is False, transformers may ask at the terminal
_OF_TOKENIZERS = re.compile(r"token|vocab|merges|piece|bpe|\.model$|tekken")  # names of files that a tokenizer reads


class LoadedModel:
    """A causal language model with its tokenizer, whose format can be changed after loading.

    Attributes:
        source: the folder or model id that it was loaded from.
        model, tokenizer: the objects of transformers; the model is in evaluation mode.
        isq: the format requested last; None: the weights are as in the checkpoint.
        packed: whether the checkpoint itself is quantized.
        report: the report of the last quantization, or None.
        load_seconds: wall time of loading, including quantizing.
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
            isq: the format or number of bits; None: leave the weights as they are.
            device: the device to run on; None: the CPU.
            options: further arguments of `quantize_` (topology, organization, imatrix or calibration_file, fallback,
                those for "auto"). `requantize` uses them too. Calibration runs the float model, which then must fit
                into memory.

        Raises:
            ValueError: the format is unknown, options are given without a format, or a format is given for a checkpoint
                that is already quantized.
            OSError: the folder or model does not exist.
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
        """Largest number of tokens of prompt and reply together; None: no limit is known."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def check(self, isq: str) -> None:
        """ValueError if `requantize` would refuse this format."""
        check_spec(isq, self.device)
        if mix_name(isq) == AUTO:
            check_budget(isq, self.options)

    def requantize(self, isq: str, source: str | None = None) -> QuantReport:
        """Change the format of the model.

        The weights are read from the checkpoint again, so that a format with more bits is more accurate. The old and
        the new packed layers are in memory together for a moment. If the checkpoint itself is quantized, its packed
        weights are converted, and the report notes this. Topology, importance and the other options are kept. `model`
        is a new object afterwards if it was not quantized before, or if the format is "auto".

        Args:
            isq: the format or number of bits.
            source: another source of the float weights, or "stored"; see `isqtorch.requantize_`.

        Raises:
            ValueError, OSError: as for loading. The model is unchanged.
        """
        self.check(isq)
        if (self.packed or self.report is not None) and mix_name(isq) != AUTO:
            if source is None and self.packed:
                source = STORED
            options = self._options(isq)
            if mix_name(isq) is not None or not resolve_format(isq, self.device or "cpu").activations:
                options.pop("activations", None)  # it is only for fp8; layers that stay in fp8 keep the permission
            self.report = requantize_(self.model, isq, source=source, progress=False, **options)
        else:
            self.model, self.report = self._load(isq)
            gc.collect()  # frees the old model, whose modules refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.isq = isq
        assert self.report is not None
        return self.report

    def _options(self, isq: str | None) -> dict[str, Any]:
        """The options that apply to a format. "auto" has options of its own, and reads the calibration text again."""
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
        """Load the float model, collect an importance matrix on the text (kept for `requantize`), and quantize."""
        model = load_causal_lm(self.source, device=self.device)
        text = Path(options.pop("calibration_file"))
        asked = {name: value for name, value in options.items() if name not in ("imatrix", *AUTO_OPTIONS)}
        if mix_name(isq) != AUTO:
            plan(model, isq, **asked)  # raises errors before minutes of calibration
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

    With a format, each weight is packed as it is read. For a folder with a file of `isqtorch.checkpoint.save`, the
    model is built from its configuration, and then the packed weights are loaded.
    """
    with needs_transformers():
        from transformers import AutoModelForCausalLM, utils

    utils.logging.disable_progress_bar()
    check_folder(source)
    settings: dict[str, Any] = {} if device is None else {"device_map": device}
    with _from_hub(source):
        config = _config(source)
        if isq is not None:
            method = _quantized_by(config)
            if method is not None:
                raise _already(source, method)
            options = {name: value for name, value in (options or {}).items() if value is not None}
            from isqtorch.integrations.transformers import IsqConfig

            settings["quantization_config"] = IsqConfig(isq, **options)
        if causal_class(config) is None:
            raise not_causal(source, config)
        other = other_class(config)
        if not _has_own_header(source):
            model, found = AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", output_loading_info=True, **settings, **_NO_CODE
            )
            if found["missing_keys"]:
                raise not_causal(source, config, sorted(found["missing_keys"]))
            if other is not None:
                warnings.warn(f"{described(source, config)}; it runs as {other}, without its other parts", stacklevel=2)
            return model.eval()
        if other is not None:
            raise not_causal(source, config)
        from accelerate import init_empty_weights

        with init_empty_weights():  # buffers get real values, because no file has them
            model = AutoModelForCausalLM.from_config(config)
        checkpoint.load_(model, Path(source))
        return model.eval() if device is None else model.eval().to(device)


def require_causal_lm(source: str) -> None:
    """ValueError unless the model would be loaded, and saved, as the class that its config.json names."""
    check_folder(source)
    config = _config(source)
    if causal_class(config) is None or other_class(config) is not None:
        raise not_causal(source, config)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model.

    Raises:
        OSError: there is no model, or it has no tokenizer.
        ValueError: the files of its tokenizer are damaged.
    """
    with needs_transformers():
        from transformers import AutoTokenizer

    check_folder(source)
    try:
        with _from_hub(source):
            tokenizer = AutoTokenizer.from_pretrained(source, **_NO_CODE)
    except Exception as error:  # damaged files raise anything, and missing ones a list of all that was tried
        if isinstance(error, ImportError) or not os.path.isdir(source) or "trust_remote_code" in str(error):
            raise
        if not any(_OF_TOKENIZERS.search(name) for name in os.listdir(source)):
            raise _no_tokenizer(source) from error
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(
            f"the tokenizer in {source} cannot be loaded ({type(error).__name__}: {reason:.300}). Copy its files again from the "
            "original model."
        ) from error
    known = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if not known:  # without files, many classes of transformers make a tokenizer that knows no text
        raise _no_tokenizer(source)
    return tokenizer


def _no_tokenizer(source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source} has no tokenizer, which this command needs beside the weights. Copy the tokenizer files of the original "
        f"model there (tokenizer.json and tokenizer_config.json), or write them: tokenizer.save_pretrained({source!r})."
    )


def check_spec(isq: str, device: str | None = None) -> None:
    """ValueError with a list of all formats, unless `isq` is a format, a number of bits, or a rule for whole models."""
    if mix_name(isq) is None:
        resolve_format(isq, torch.device(device or "cpu"))


def check_request(
    source: str, isq: str | None, device: str | None = None, options: Mapping[str, Any] | None = None
) -> bool:
    """Check a request to load before anything slow happens; for errors see `LoadedModel`.

    Returns:
        Whether `source` is a folder with a quantized checkpoint.
    """
    check_folder(source)
    if device is not None:
        checked_device(device, "device")
    text = (options or {}).get("calibration_file")
    if text is not None:
        if not os.path.exists(text):
            raise FileNotFoundError(f"no calibration text {text}")
        regular(text)
    method = packed_by(source)
    if isq is not None:
        check_spec(isq, device)
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
    """The checked budget of "auto"; None for other formats."""
    given: dict[str, Any] = {name: options.get(name) for name in AUTO_OPTIONS}
    return Budget.of("--isq", isq, Options(**given))


def packed_by(source: str) -> str | None:
    """The quantization method of the checkpoint in a folder; None if it is not quantized or there is no such folder."""
    if not os.path.isdir(source):
        return None
    if _has_own_header(source):
        return "isq"
    return _quantized_by(_config(source))


def _config(source: str) -> Any:
    """The configuration of a model."""
    with needs_transformers():
        from transformers import AutoConfig

    with _from_hub(source):
        return AutoConfig.from_pretrained(source, **_NO_CODE)


def _quantized_by(config: Any) -> str | None:
    """The quantization method in a model's configuration, or None."""
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
    """Raise if `source` is a path without a model: transformers would look it up on the Hub, with a confusing error."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).is_dir():
        raise FileNotFoundError(f"no folder {source}: give a folder with config.json and safetensors, or a model id")
    if os.path.isdir(source) and not Path(source, "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: it is not a model folder")


def _has_own_header(source: str) -> bool:
    """Whether a folder's weights were written by `isqtorch.checkpoint.save`. transformers cannot load such files."""
    path = Path(source, "model.safetensors")
    if not path.is_file():
        return False
    with opened(path, "np") as file:
        return "isqtorch" in (file.metadata() or {})


@contextmanager
def needs_transformers() -> Iterator[None]:
    """Turn the import error of a missing transformers into a message that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError("this command loads models with transformers: pip install 'isqtorch[hf]'") from error


@contextmanager
def _from_hub(source: str) -> Iterator[None]:
    """Turn errors of the Hub, and about code of a model, into one line; other errors of folders are clear already."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source} is a model with Python code of its own, which this command does not run. If you trust it: model = "
            "transformers.AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True); isqtorch.quantize_(model, 4)"
        ) from error
    except OSError as error:
        if os.path.isdir(source):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise OSError(
            f"cannot load {source!r}: there is no such folder here, and the Hub or its local cache does not give it ({reason}). "
            "Check the name and the connection, or give a local folder."
        ) from error
