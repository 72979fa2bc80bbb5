"""IsqConfig(rule="feedback", calibration_file=...): the first of two readings of a checkpoint packs the decoder layers.

It streams a second model on the meta device, layer by layer. The second reading is the ordinary load, which takes the
packed layers over and packs the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping

from isqtorch.importance.tokens import HOLD_EVERY
from isqtorch.importance.windows import token_windows
from isqtorch.inplace.prepare import Prepared
from isqtorch.inplace.streaming import Streamed, stream
from isqtorch.integrations.bounded import parameters_on_meta
from isqtorch.integrations.record import METHOD
from isqtorch.policy.options import Options

from .source import ConvertedSource


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def feed_while_loading(model: Any, options: Options, prepared: Prepared, files: Sequence[str]) -> Streamed:
    """Pack the decoder layers of a checkpoint.

    Args:
        model: the model that is being loaded, still without weights.
        options: the text and its tokenizer.
        prepared: the request.
        files: the files of the checkpoint.

    Raises:
        Misfit: the model does not run layer by layer.
        ValueError: see `stream`; or the checkpoint does not come from safetensors files, or several processes load it.
    """
    if not files:
        raise ValueError(
            f"{METHOD}: calibration_file reads the checkpoint twice, and this one is not in safetensors files. Use quantize_."
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"{METHOD}: calibration_file runs whole layers, and here each process reads its share. Save moments in one process "
            "(isqtorch.collect_moments), and give that file as imatrix."
        )
    settings = copy.deepcopy(model.config)
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with parameters_on_meta(str(Path(files[0]).parent)), torch.device("cpu"):
        twin = type(model)._from_config(settings, dtype=model.dtype)
    with torch.device("cpu"), _default_dtype(torch.float32):  # the loader makes others the defaults
        windows = token_windows(twin, options.calibration_file or "", options.tokenizer, "IsqConfig", least=HOLD_EVERY)
        kinds = {layer.device_type for layer in prepared.inventory.layers}
        device = torch.device(kinds.pop() if len(kinds) == 1 else "cpu")
        source = ConvertedSource(twin, files, get_model_conversion_mapping(twin))
        streamed = stream(twin, source, windows, prepared, device, options.progress)
    count, size, (dataset,) = windows.facts
    streamed.prepared.notes.append(
        f"moments collected layer by layer while loading, on {count} chunks of {size} tokens from {Path(dataset).name}"
    )
    return streamed
