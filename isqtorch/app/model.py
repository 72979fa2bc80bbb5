"""A model of the commands: what is checked before anything slow happens, and a format that can change later."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isqtorch.auto import AUTO_OPTIONS, Budget
from isqtorch.files.binary import regular
from isqtorch.formats import AUTO, mix_name, resolve_format
from isqtorch.importance.windows import is_self
from isqtorch.inplace.requantize import requantize_
from isqtorch.inplace.weights import STORED
from isqtorch.integrations.classes import Need, unable
from isqtorch.integrations.companions import copy_files
from isqtorch.integrations.generation import optimize_
from isqtorch.integrations.loading import Loaded, checked_request, load_opened
from isqtorch.integrations.opening import Opened
from isqtorch.integrations.record import METHOD
from isqtorch.policy.inventory import packed_names
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request, checked_device
from isqtorch.report.report import QuantReport


@dataclass(frozen=True)
class State:
    """The weights that a model had at some time: its format, the importance it was packed with, whether it was packed."""

    isq: str | None
    imatrix: Any
    packed: bool


class LoadedModel:
    """A model with its tokenizer, whose format can be changed after loading.

    Attributes:
        source: the folder, file or id that it was loaded from.
        model: the model of transformers, of the class that its configuration names, in evaluation mode.
        tokenizer: its tokenizer; None: it has none, and the command needs none.
        isq: the format requested last; None: the weights are as in the checkpoint.
        packed: whether the checkpoint was written by isqtorch, so that nothing has the weights before they were packed.
        report: the report, if any weight is packed; else None.
        load_seconds: wall time of loading, including quantizing.
        kv: the formats of keys and of values in the cache; None: floats.
        opened: the model before its weights were read.
        loaded: what `isqtorch.load` gave.
    """

    def __init__(
        self,
        source: str,
        isq: str | None = None,
        *,
        need: Need | None = None,
        command: str = "this command",
        opened: Opened | None = None,
        device: str | None = None,
        options: Mapping[str, Any] | None = None,
        kv: tuple[str, str] | None = None,
        fast: bool = False,
    ) -> None:
        """Load a model.

        Args:
            source: what `isqtorch.load` takes.
            isq: the format or number of bits; None: leave the weights as they are.
            need: what the command needs of the model; None: any model will do.
            command: name of the command, for messages.
            opened: what `check_request` has returned; None: it is called here.
            device: the device to run on; None: the CPU.
            options: further arguments of `isqtorch.load` (topology, organization, imatrix or calibration_file,
                fallback, those for "auto"). `requantize` uses them too.
            kv: the formats of keys and of values in the cache; None: floats.
            fast: whether the model will generate: on a CPU, `isqtorch.optimize_` sets it up.

        Raises:
            ValueError: the format is unknown, options are given without a format, a format is given for a checkpoint
                that is already quantized, or the model does not do what the command needs, or has no keys and values
                that could be packed.
            OSError: the file, folder or model does not exist.
            ImportError: transformers or accelerate is missing.
        """
        self.source, self.isq, self.device, self.options = source, isq, device, dict(options or {})
        self.fast = fast
        self.opened = opened or check_request(source, isq, device, self.options)
        self.packed = self.opened.quantized_by == METHOD
        if need is not None:
            self.opened.check(need, command)
        self.kv = kv
        if kv is not None:
            self._check_kv(kv)
        began = time.perf_counter()
        self.loaded = self._load(isq)
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.report = self.loaded.report if packed_names(self.model) else None
        self.load_seconds = time.perf_counter() - began

    @property
    def continues(self) -> bool:
        """Whether the model predicts the next token of a text."""
        return unable(self.opened.cls, self.opened.config, "continues") is None

    @property
    def processor(self) -> Any:
        """What reads images or sound for the model, with the tokenizer in it; None: the model reads text alone."""
        return self.loaded.processor

    @property
    def sees(self) -> bool:
        """Whether the model continues texts with images in them, and its processor is there to read these."""
        return self.continues and getattr(self.processor, "image_processor", None) is not None

    @property
    def chat_writer(self) -> Any:
        """What has the chat template: the processor of a model that sees, else the tokenizer."""
        return self.processor if self.sees else self.tokenizer

    def template_settings(self, text: str) -> dict[str, Any]:
        """Settings of the tokenizer for a text that the template of a processor has written, with or without its first token."""
        begin = self.tokenizer.bos_token
        return {"add_special_tokens": False} if begin is not None and text.startswith(begin) else {}

    @property
    def context(self) -> int | None:
        """Largest number of tokens of prompt and reply together; None: no limit is known."""
        length = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def new_cache(self) -> dict[str, Any]:
        """The argument of `generate` for an empty cache; none if the cache is one of floats."""
        from isqtorch.integrations.transformers.quantized_cache import new_cache

        return new_cache(self.model, self.kv)

    def _check_kv(self, kv: tuple[str, str]) -> None:
        from isqtorch.integrations.transformers.quantized_cache import check_cache

        try:
            check_cache(self.opened.cls, self.opened.config, kv)
        except ValueError as error:
            raise ValueError(f"--kv {'/'.join(dict.fromkeys(kv))}: {error}") from error

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
            if "calibration_file" in options:
                options["tokenizer"] = self.tokenizer
            if mix_name(isq) is not None or not resolve_format(isq, self.device or "cpu").activations:
                options.pop("activations", None)  # it is only for fp8; layers that stay in fp8 keep the permission
            self.report = requantize_(self.model, isq, source=source, progress=False, **options)
        else:
            self.loaded = self._load(isq)
            self.model, self.report = self.loaded.model, self.loaded.report
            gc.collect()  # frees the old model, whose modules refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.isq = isq
        assert self.report is not None
        return self.report

    def state(self) -> State:
        """What `restore` needs to come back to the present weights. It holds no weights."""
        return State(self.isq, self.options.get("imatrix"), self.report is not None)

    def restore(self, state: State) -> QuantReport | None:
        """Make the weights again that the model had at an earlier time: the same bytes, from the source it was loaded from.

        Args:
            state: from `state()`. If that model was loaded as it is, it is loaded again, and `model` is a new object.

        Returns:
            The report; None: nothing is packed.
        """
        self.options["imatrix"] = state.imatrix
        if state.isq is not None:
            return self.requantize(state.isq)
        self.loaded = self._load(None)
        self.model, self.isq = self.loaded.model, None
        self.report = self.loaded.report if state.packed else None
        gc.collect()  # frees the old model, whose modules refer to each other
        return self.report

    def save(self, folder: Path) -> None:
        """Write the model with its tokenizer and settings into an empty folder."""
        self.model.save_pretrained(folder)  # with the generation settings
        self.opened.companions.save(folder)
        if self.opened.home is not None:
            copy_files(self.opened.home, folder, local=self.opened.local)

    def _options(self, isq: str | None) -> dict[str, Any]:
        return options_for(isq, self.options)

    def _load(self, isq: str | None) -> Loaded:
        options = Options(progress=False, **(self._options(isq) if isq is not None else {}))
        device = None if self.device is None else torch.device(self.device)
        found = load_opened(self.opened, checked_request(isq, options), device=device)
        if found.imatrix is not None:  # so that `requantize` need not calibrate again
            self.options["imatrix"] = found.imatrix
        model: Any = found.model
        if self.fast and self.continues and model.device.type == "cpu":
            optimize_(model)
        return found


def options_for(isq: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that apply to a format. "auto" has options of its own, and reads the calibration text again."""
    given = {name: value for name, value in options.items() if value is not None}
    if mix_name(isq) == AUTO:
        return given
    return {
        name: value
        for name, value in given.items()
        if name not in AUTO_OPTIONS and not (name == "calibration_file" and "imatrix" in given)
    }


def check_spec(isq: str, device: str | None = None) -> None:
    """ValueError with a list of all formats, unless `isq` is a format, a number of bits, or a rule for whole models."""
    if mix_name(isq) is None:
        resolve_format(isq, torch.device(device or "cpu"))


def check_request(
    source: str, isq: str | None, device: str | None = None, options: Mapping[str, Any] | None = None
) -> Opened:
    """Check a request to load before anything slow happens; for errors see `LoadedModel`."""
    if device is not None:
        checked_device(device, "device")
    text = (options or {}).get("calibration_file")
    if text is not None and not is_self(text):
        if not os.path.exists(text):
            raise FileNotFoundError(f"no calibration text {text}")
        regular(Path(text))
    if isq is not None:
        check_spec(isq, device)
        check_budget(isq, options or {})
        if mix_name(isq) != AUTO and text is not None and (options or {}).get("imatrix") is not None:
            raise ValueError("give either imatrix or calibration_file, not both")
    elif any(
        (options or {}).get(name)
        for name in ("topology", "imatrix", "calibration_file", "rule", "max_memory", "activations", *AUTO_OPTIONS)
    ):
        raise ValueError(
            "--topology, --imatrix, --calibration, --calibration-file, --rule, --max-memory, --activations and the options of "
            "auto need --isq FORMAT"
        )
    found = Opened.of(source)
    if isq is not None and found.quantized_by == METHOD:
        raise ValueError(f"{source} is quantized already; leave out --isq, or give the original model")
    return found


def request_of(isq: str | None, options: Mapping[str, Any]) -> Request | None:
    """The request of a command that `check_request` has checked; None: the weights stay as they are."""
    return checked_request(isq, Options(**options))


def check_budget(isq: str, options: Mapping[str, Any]) -> Budget | None:
    """The checked budget of "auto"; None for other formats."""
    given: dict[str, Any] = {name: options.get(name) for name in AUTO_OPTIONS}
    return Budget.of("--isq", isq, Options(**given))
