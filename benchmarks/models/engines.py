"""Libraries that load a model and generate: ours, and others where they are installed.

One engine lives in one process and holds one model. Other libraries are imported when an engine is opened, so that a missing one is an
answer, `Unavailable`, and not a crash.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..peers import Array, Unavailable, bitsandbytes, torchao
from ..peers.ggml import TYPES
from .checkpoints import REAL
from .prompts import tokens
from .texts import MistralRs, OpenVino

ISQTORCH, TRANSFORMERS, BITSANDBYTES, TORCHAO = "isqtorch", "transformers", "bitsandbytes", "torchao"
LLAMA_CPP, LLAMA_CPP_SLEEPING = "llama.cpp", "llama.cpp, threads sleep"
MISTRAL_RS, OPENVINO = "mistral.rs", "OpenVINO"
LLAMA_CPPS = (LLAMA_CPP, LLAMA_CPP_SLEEPING)
BF16 = "bf16"  # the model as its checkpoint has it, by transformers alone
_TRY = 256  # rows and columns of a matrix to try a library with
_LEFT = 0.05  # of a model may stay in float: routers


class Engine(Protocol):
    """A library, loaded."""

    version: str

    @property
    def size(self) -> int:
        """Bytes of the weights of the loaded model."""

    def prepare(self, folder: Path, fmt: str) -> Path:
        """Whatever has to be done once before a checkpoint can be loaded; returns what to load."""

    def load(self, source: Path, fmt: str) -> None:
        """Load the model in place of the one before.

        Raises:
            Unavailable: this library does not take this model or format, or leaves most of it as it is.
        """

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        """Seconds for a prompt of that many tokens, and for the `new - 1` tokens after the first new one."""

    def logits(self, ids: Array) -> Array | None:
        """f32 `[vocabulary]`: the logits after those tokens; None: it does not give them."""


class Transformers:
    """Models of transformers as their checkpoints have them, and base of those that something quantizes."""

    def __init__(self) -> None:
        import torch
        import transformers
        import transformers.generation
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen3_moe.modeling_qwen3_moe  # what importing takes is no part of loading

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._torch, self.version = torch, transformers.__version__
        self.model: Any = None
        self._optimized: Any = None  # the model that is

    @property
    def size(self) -> int:
        found = {}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            for part in self._parts(tensor):
                found[part.data_ptr()] = part.nbytes
        return sum(found.values())

    @classmethod
    def _parts(cls, tensor: Any) -> list[Any]:
        """The tensors with data that a parameter consists of, whichever way its library keeps them."""
        state = getattr(tensor, "quant_state", None)  # of bitsandbytes
        if state is not None:
            return [tensor, state.absmax]
        if hasattr(tensor, "__tensor_flatten__"):  # of torchao, and any other subclass that wraps tensors
            names, _ = tensor.__tensor_flatten__()
            return [part for name in names for part in cls._parts(getattr(tensor, name))]
        return [tensor]

    def prepare(self, folder: Path, fmt: str) -> Path:
        return folder

    def load(self, source: Path, fmt: str) -> None:
        self.model = None
        self.model = self._load(str(source), fmt)

    def _load(self, source: str, fmt: str) -> Any:
        import isqtorch

        return isqtorch.load(source).model

    def _quantized_by(self, source: str, config: object) -> Any:
        """The model, quantized by another library through transformers."""
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=config).eval()
        except Exception as error:  # the library's word on what it cannot do
            raise Unavailable(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from error

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        from isqtorch.app.benchmark import timed_generate

        ids = self._torch.from_numpy(tokens(self.model.config.vocab_size, prompt))[None]
        with self._torch.inference_mode():
            return timed_generate(self.model, ids, new)

    def logits(self, ids: Array) -> Array:
        with self._torch.inference_mode():
            found = self.model(self._torch.from_numpy(ids)[None], logits_to_keep=1).logits
        values: Array = found[0, -1].float().numpy()
        return values


class Ours(Transformers):
    """isqtorch; without a format, a checkpoint that it has saved. It generates after `optimize_`, as `isqtorch run` does."""

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        import isqtorch

        if self._optimized is not self.model:
            print(isqtorch.optimize_(self.model), file=sys.stderr)
            self._optimized = self.model
        return super().generate(prompt, new)

    def token_bytes(self, prompt: int) -> int:
        """Bytes of weights, keys and values that a token after a prompt reads."""
        from isqtorch.app.roofline import bytes_of_token

        ids = self._torch.from_numpy(tokens(self.model.config.vocab_size, prompt))[None]
        return sum(bytes_of_token(self.model, ids))

    def _load(self, source: str, fmt: str) -> Any:
        import isqtorch

        model = isqtorch.load(source, fmt or None).model
        left = sum(p.nbytes for p in model.parameters() if p.ndim > 1 and p.dtype != self._torch.uint8)
        share = left / sum(p.nbytes for p in model.parameters())
        if share > _LEFT:  # then size, memory and speed are not those of the format
            raise Unavailable(f"{100 * share:.0f} % of the bytes of the model are matrices that were not quantized")
        return model


class BitsAndBytes(Transformers):
    """NF4, computing in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.version = bitsandbytes.open().version

    def _load(self, source: str, fmt: str) -> Any:
        from transformers import BitsAndBytesConfig

        options = {"load_in_4bit": True, "bnb_4bit_quant_type": fmt, "bnb_4bit_compute_dtype": self._torch.bfloat16}
        return self._quantized_by(source, BitsAndBytesConfig(**options))


class TorchAO(Transformers):
    """Weight-only int8 and int4, eager."""

    def __init__(self) -> None:
        super().__init__()
        self._library = torchao.open()
        self.version = self._library.version

    def _load(self, source: str, fmt: str) -> Any:
        from transformers import TorchAoConfig

        few = np.ones(
            (_TRY, _TRY), np.float32
        )  # says clearly what it cannot do; of a whole model transformers does not
        self._library.linear(fmt, "eager", few, few, copies=1, threads=self._torch.get_num_threads())
        return self._quantized_by(source, TorchAoConfig(torchao.configuration(fmt)))


FORMATS: dict[str, tuple[str, ...]] = {BITSANDBYTES: bitsandbytes.FORMATS, TORCHAO: torchao.FORMATS}
"""Of other libraries through transformers, whose formats are not ours."""

ENVIRONMENT: dict[str, dict[str, str | None]] = {LLAMA_CPP_SLEEPING: {"OMP_WAIT_POLICY": "passive"}}
"""Variables of a library's process. For others, no variable says how OpenMP's threads wait: GNU's spin for some milliseconds."""


def same_formats(model: str, fmt: str) -> list[str]:
    """Other libraries that have one of our formats. Those that want a text are measured with a model that has a tokenizer."""
    found = [*LLAMA_CPPS] if fmt in TYPES else []
    if model in REAL:
        found += [MISTRAL_RS] if fmt in MistralRs.FORMATS else []
        found += [OPENVINO] if fmt in OpenVino.FORMATS else []
    return found


def open(who: str) -> Engine:
    """Load a library.

    Raises:
        Unavailable: it is not installed, and what to install.
    """
    if who in LLAMA_CPPS:
        engine: Engine = importlib.import_module(".llama_cpp", __package__).LlamaCpp(sleeps=who == LLAMA_CPP_SLEEPING)
        return engine
    kinds: dict[str, type[Engine]] = {ISQTORCH: Ours, TRANSFORMERS: Transformers, BITSANDBYTES: BitsAndBytes}
    kinds |= {TORCHAO: TorchAO, MISTRAL_RS: MistralRs, OPENVINO: OpenVino}
    return kinds[who]()
