"""Libraries that take a text and give no logits: mistral.rs, and OpenVINO GenAI.

The prompt is one word, as often as it takes tokens; the library says how many it has seen, and which time it took.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from ..peers import Array, Unavailable

INSTALL_MISTRAL_RS = "pip install mistralrs"
INSTALL_OPENVINO = "pip install openvino-genai"
_WORD = " the"  # one token of most tokenizers


class MistralRs:
    """mistral.rs with in-situ quantization, as it is built for CPUs; its threads are its own."""

    FORMATS: ClassVar = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4k": "Q4K", "afq4": "AFQ4"}

    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            import mistralrs
        except ImportError as error:
            raise Unavailable(f"not installed: {INSTALL_MISTRAL_RS}") from error
        from importlib.metadata import version

        self._library: Any = mistralrs
        self.version = version("mistralrs")
        self._runner: Any = None
        self.size = 0

    def prepare(self, folder: Path, fmt: str) -> Path:
        """It reads configurations of transformers 4, in which the base of the rotation has another place."""
        if not (folder / "tokenizer.json").exists():
            raise Unavailable("it takes texts, and this model has no tokenizer")
        path = folder / "mistral.rs"
        path.mkdir(exist_ok=True)
        for file in folder.iterdir():
            if file.is_file() and file.name != "config.json" and not (path / file.name).exists():
                (path / file.name).symlink_to(file.resolve())
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return path

    def load(self, source: Path, fmt: str) -> None:
        self._runner = None
        which = self._library.Which.Plain(model_id=str(source), arch=self._library.Architecture.Llama)
        try:
            # Without a cache of prompts, which would find the prompt of the turn before.
            self._runner = self._library.Runner(which=which, in_situ_quant=self.FORMATS[fmt], prefix_cache_n=0)
        except Exception as error:  # its word on what it cannot do
            raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        request = self._library.CompletionRequest(
            model="default", prompt=_WORD * prompt, max_tokens=new, temperature=0.0, ignore_eos=True
        )
        began = time.perf_counter()
        usage = self._runner.send_completion_request(request).usage
        seconds = time.perf_counter() - began
        _check(usage.prompt_tokens, prompt, usage.completion_tokens, new)
        rest = float(usage.total_completion_time_sec)  # after the first new token
        return seconds - rest, rest

    def logits(self, ids: Array) -> None:
        """It gives none."""


class OpenVino:
    """OpenVINO GenAI on a GGUF file that we export; it has formats of its own for the weights in it."""

    FORMATS = ("q8_0", "q4_0")

    def __init__(self) -> None:
        try:
            import openvino_genai
        except (ImportError, OSError) as error:
            raise Unavailable(f"not installed: {INSTALL_OPENVINO}") from error
        self._library: Any = openvino_genai
        self.version: str = openvino_genai.__version__
        self._pipeline: Any = None
        self.size = 0

    def prepare(self, folder: Path, fmt: str) -> Path:
        if not (folder / "tokenizer.json").exists():
            raise Unavailable("it takes texts, and this model has no tokenizer")
        path = folder / f"{fmt}.gguf"
        if not path.exists():
            import isqtorch

            loaded = isqtorch.load(str(folder), fmt, progress=False)
            isqtorch.export_gguf(loaded.model, path, tokenizer=loaded.tokenizer)
        return path

    def load(self, source: Path, fmt: str) -> None:
        self._pipeline = None
        settings = self._library.SchedulerConfig()
        settings.enable_prefix_caching = False  # it would find the prompt of the turn before
        try:
            self._pipeline = self._library.LLMPipeline(str(source), "CPU", scheduler_config=settings)
        except RuntimeError as error:
            raise Unavailable(f"{' '.join(str(error).split())[:160]}") from error

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        settings = self._library.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = new, False, True
        settings.apply_chat_template = False
        found = self._pipeline.generate([_WORD * prompt], settings).perf_metrics
        _check(found.get_num_input_tokens(), prompt, found.get_num_generated_tokens(), new)
        rest = found.get_tpot().mean / 1e3 * (new - 1) if new > 1 else 0.0
        return found.get_ttft().mean / 1e3, rest

    def logits(self, ids: Array) -> None:
        """It gives none."""


def _check(prompt: int, wanted_prompt: int, new: int, wanted_new: int) -> None:
    """Unavailable if a library did something else than it was asked for; a token at the begin of a text is allowed."""
    if prompt not in (wanted_prompt, wanted_prompt + 1) or new != wanted_new:
        asked = f"{wanted_prompt} tokens of a prompt and {wanted_new} new ones"
        raise Unavailable(f"asked for {asked}, it computed {prompt} and {new}")
