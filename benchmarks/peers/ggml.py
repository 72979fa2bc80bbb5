"""ggml, llama.cpp's tensor library, through its C API: products of packed weights, and its quantizers.

The libraries come from the folder in ISQTORCH_GGML_LIB or from an installed llama-cpp-python. A product runs as llama.cpp would
run it: weights lie in a buffer of the plain CPU type or, where the CPU backend offers them for this format and shape, of one of its
extra types (CPU_REPACK, AMX), which rearrange the bytes when they are set. Each of these is a path of its own here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
from contextlib import ExitStack
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from . import Array, Unavailable

NAME = "ggml"
INSTALL = "pip install llama-cpp-python, or set ISQTORCH_GGML_LIB to a folder with libggml*"

TYPES = {"f32": 0, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
TYPES |= {"q2k": 10, "q3k": 11, "q4k": 12, "q5k": 13, "q6k": 14, "iq4_nl": 20, "iq4_xs": 23, "mxfp4": 39}
FORMATS = tuple(name for name in TYPES if name not in ("f32", "bf16"))
PLAIN = "plain"
TAKES_NOT = "takes no such format or shape"  # said of a path; not worth a line in the report
_LEVELS = ("avx2", "avx512", "avx512_vnni", "amx_int8")
_GRAPH_NODES = 8  # a product needs three


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _ThreadpoolParams(ctypes.Structure):
    """ggml_threadpool_params; filled by ggml itself, so that only its size matters here."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


_SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_version": (c_char_p, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
    "ggml_backend_buffer_get_size": (c_size_t, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_threadpool_params_default": (_ThreadpoolParams, [c_int]),
}
_CPU_SIGNATURES = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [POINTER(_ThreadpoolParams)]),
    **{f"ggml_cpu_has_{name}": (c_int, []) for name in _LEVELS},
}


def library_folder() -> Path:
    """Where libggml-base and libggml-cpu are.

    Raises:
        Unavailable: nowhere.
    """
    given = os.environ.get("ISQTORCH_GGML_LIB")
    if given:
        return Path(given)
    found = importlib.util.find_spec("llama_cpp")  # not imported: that would load all of llama.cpp
    if found is None or found.origin is None:
        raise Unavailable(f"not installed: {INSTALL}")
    return Path(found.origin).parent / "lib"


def _load(folder: Path, stem: str) -> ctypes.CDLL:
    for suffix in (".so", ".so.0", ".dylib"):
        path = folder / f"lib{stem}{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    raise Unavailable(f"no lib{stem} in {folder}: {INSTALL}")


class _Api:
    """The functions above with their types, from whichever library has them."""

    def __init__(self, folder: Path) -> None:
        self.functions: dict[str, Any] = {}
        base, cpu = _load(folder, "ggml-base"), _load(folder, "ggml-cpu")
        for library, signatures in ((base, _SIGNATURES), (cpu, _CPU_SIGNATURES)):
            for name, (result, arguments) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                self.functions[name] = function

    def __getattr__(self, name: str) -> Any:
        return self.functions[name]


class _Product:
    """One graph `ggml_mul_mat(weight, x)` for every copy of the weight; calls take turns."""

    def __init__(
        self, api: _Api, backend: int, buft: int, packed: Array, fmt: str, x: Array, n: int, copies: int
    ) -> None:
        self._api, self._backend, self._shape, self._turn = api, backend, (x.shape[0], n), 0
        self._owned = ExitStack()  # ggml's objects, freed with this one
        self.nbytes = packed.nbytes
        weights = self._weights(buft, packed, fmt, x.shape[1], n, copies)

        nodes = 1 + copies  # x, and y of every copy
        context = self._context(nodes, graphs=copies)
        inputs = api.ggml_new_tensor_2d(context, TYPES["f32"], x.shape[1], x.shape[0])
        self._graphs: list[int] = []
        self._outputs: list[int] = []
        for weight in weights:
            y = api.ggml_mul_mat(context, weight, inputs)
            if not api.ggml_backend_supports_op(backend, y):
                raise Unavailable(TAKES_NOT)
            graph = api.ggml_new_graph_custom(context, _GRAPH_NODES, False)
            api.ggml_build_forward_expand(graph, y)
            self._graphs.append(graph)
            self._outputs.append(y)
        self._allocate(context, api.ggml_backend_cpu_buffer_type())
        api.ggml_backend_tensor_set(inputs, x.ctypes.data, 0, x.nbytes)
        self._fill(weights, packed)

    def _context(self, tensors: int, graphs: int = 0) -> int:
        api = self._api
        size = tensors * api.ggml_tensor_overhead() + graphs * api.ggml_graph_overhead_custom(_GRAPH_NODES, False)
        context: int = api.ggml_init(_InitParams(size, None, True))
        self._owned.callback(api.ggml_free, context)
        return context

    def _allocate(self, context: int, buft: int) -> int:
        buffer: int = self._api.ggml_backend_alloc_ctx_tensors_from_buft(context, buft)
        self._owned.callback(self._api.ggml_backend_buffer_free, buffer)
        return buffer

    def _weights(self, buft: int, packed: Array, fmt: str, k: int, n: int, copies: int) -> list[int]:
        self._buffers: list[int] = []
        tensors = []
        for _ in range(copies):
            context = self._context(1)
            tensors.append(self._api.ggml_new_tensor_2d(context, TYPES[fmt], k, n))
            self._buffers.append(self._allocate(context, buft))
        return tensors

    def _fill(self, weights: list[int], packed: Array) -> None:
        """Set the first copy, which rearranges its bytes, and copy the rearranged bytes to the others."""
        api = self._api
        api.ggml_backend_tensor_set(weights[0], packed.ctypes.data, 0, packed.nbytes)
        source, *others = (api.ggml_backend_buffer_get_base(buffer) for buffer in self._buffers)
        for target in others:
            ctypes.memmove(target, source, api.ggml_backend_buffer_get_size(self._buffers[0]))

    def __call__(self) -> None:
        self._turn = (self._turn + 1) % len(self._graphs)
        self._api.ggml_backend_graph_compute(self._backend, self._graphs[self._turn])

    def result(self) -> Array:
        y = np.empty(self._shape, np.float32)
        self._api.ggml_backend_tensor_get(self._outputs[self._turn], y.ctypes.data, 0, y.nbytes)
        return y

    def __del__(self) -> None:
        self._owned.close()


class Ggml:
    """ggml's CPU backend. One backend per number of threads, each with a pool of threads that lives on."""

    def __init__(self, folder: Path) -> None:
        self._api = api = _Api(folder)
        self._silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        api.ggml_log_set(ctypes.cast(self._silent, c_void_p), None)
        self._backends: dict[int, int] = {}
        self._last: tuple[str, Array, Array] | None = None  # format, weight, packed: the same comes again and again
        self._types: dict[str, int] = {PLAIN: api.ggml_backend_cpu_buffer_type()}
        registry = api.ggml_backend_cpu_reg()
        address = api.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(api.ggml_backend_reg_dev_get(registry, 0))
            for buft in itertools.takewhile(bool, extra):  # ends with NULL
                self._types[api.ggml_backend_buft_name(buft).decode()] = buft
        levels = [name for name in _LEVELS if getattr(api, f"ggml_cpu_has_{name}")()]
        self.version = f"{api.ggml_version().decode()} ({' '.join(levels)})"

    def paths(self, fmt: str) -> list[str]:
        return list(self._types)

    def linear(self, fmt: str, path: str, weight: Array, x: Array, *, copies: int, threads: int) -> _Product:
        if self._last is None or self._last[0] != fmt or self._last[1] is not weight:
            self._last = fmt, weight, self.quantize(fmt, weight)
        backend = self._backend(threads)
        return _Product(self._api, backend, self._types[path], self._last[2], fmt, x, weight.shape[0], copies)

    def quantize(self, fmt: str, weight: Array, importance: Array | None = None) -> Array:
        """f32 `[N, K]` -> uint8 `[N, row_bytes]`, on one thread; `importance` is f32 `[K]`."""
        rows, columns = weight.shape
        packed = np.empty((rows, self._api.ggml_row_size(TYPES[fmt], columns)), np.uint8)
        vector = None if importance is None else importance.ctypes.data
        self._api.ggml_quantize_chunk(TYPES[fmt], weight.ctypes.data, packed.ctypes.data, 0, rows, columns, vector)
        return packed

    def _backend(self, threads: int) -> int:
        if threads not in self._backends:
            api = self._api
            backend = api.ggml_backend_cpu_init()
            api.ggml_backend_cpu_set_n_threads(backend, threads)
            if threads > 1:  # without a pool, every graph would start its threads anew
                parameters = api.ggml_threadpool_params_default(threads)
                api.ggml_backend_cpu_set_threadpool(backend, api.ggml_threadpool_new(ctypes.byref(parameters)))
            self._backends[threads] = backend
        return self._backends[threads]


def open() -> Ggml:
    """Load the libraries."""
    return Ggml(library_folder())
