"""llama.cpp on the packed weights that we saved: the same bytes, in a GGUF file beside them.

Its C API is called through llama-cpp-python's declarations; the `gguf` package writes the file.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..peers import Array, Unavailable
from .gguf_writer import write_gguf
from .prompts import tokens

INSTALL = "pip install llama-cpp-python gguf"
_CONTEXT = 1024


class LlamaCpp:
    """llama.cpp's CPU backend with as many threads as there are cores for this process.

    In a build with OpenMP, as the packages of llama-cpp-python are, OpenMP's threads compute: OMP_WAIT_POLICY says how they
    wait, and the setting `poll` of ggml's own threads has no effect.

    Args:
        sleeps: its threads are meant to sleep, so the build must be one with OpenMP.
    """

    def __init__(self, sleeps: bool = False) -> None:
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # the last two: its library does not load
            raise Unavailable(f"not installed: {INSTALL} ({error})") from error
        self._api: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        if sleeps and not _has_openmp(Path(llama_cpp.__file__).parent / "lib"):
            raise Unavailable(
                "this build has threads of its own, and llama-cpp-python has no setting for how they wait"
            )
        self.version: str = llama_cpp.__version__
        self._model: Any = None
        self._context: Any = None
        self._vocabulary = 0

    @property
    def size(self) -> int:
        return int(self._api.llama_model_size(self._model))

    def prepare(self, folder: Path, fmt: str) -> Path:
        path = folder / "model.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_gguf(folder, partial)
            partial.rename(path)
        return path

    def load(self, source: Path, fmt: str) -> None:
        api = self._api
        self._free()
        self._model = api.llama_model_load_from_file(os.fsencode(source), api.llama_model_default_params())
        if not self._model:
            raise Unavailable(f"does not load {source.name}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = _CONTEXT
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise Unavailable("makes no context for the model")
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        stamps = [time.perf_counter()]
        ids = tokens(self._vocabulary, prompt)
        for _ in range(new):
            ids = np.array([int(self._decode(ids).argmax())])
            stamps.append(time.perf_counter())
        return stamps[1] - stamps[0], stamps[-1] - stamps[1]

    def logits(self, ids: Array) -> Array:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._decode(ids).copy()

    def _decode(self, ids: Array) -> Array:
        """Logits after the last of these tokens, which follow those before; valid until the next call."""
        api = self._api
        array = (api.llama_token * len(ids))(*map(int, ids))
        status = api.llama_decode(self._context, api.llama_batch_get_one(array, len(ids)))
        if status != 0:
            raise Unavailable(f"llama_decode gives {status}")
        found: Array = np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        return found

    def _free(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = None


def _has_openmp(folder: Path) -> bool:
    """Whether the CPU backend among the libraries of a folder starts threads of OpenMP, GNU's or LLVM's."""
    libraries = (path.read_bytes() for path in folder.glob("*ggml-cpu*"))
    return any(name in library for library in libraries for name in (b"GOMP_parallel", b"__kmpc_fork_call"))
