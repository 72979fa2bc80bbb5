"""export_mlx: write a model as a folder of MLX."""

from __future__ import annotations

import os
from typing import Any


def export_mlx(model: Any, folder: str | os.PathLike[str], tokenizer: Any = None) -> None:
    """Write a model as a folder of MLX, which mlx-lm and LM Studio open on a Mac.

    Packed weights go into the folder as they are, with the same codes, scales and biases. Weights that are not packed
    keep their type. The folder appears when it is complete. At most one weight is copied at a time.

    Args:
        model: a causal language model of transformers, packed in affine formats ("afq4", "afq8g32") or mxfp4, or float.
        folder: a new or an empty folder.
        tokenizer: the tokenizer or processor. None: that of the folder that the model was loaded from. False: write
            none; only programs that bring their own can use such a folder.

    Raises:
        NotImplementedError: it is not known how MLX stores this architecture, or mlx-lm computes it otherwise.
        ValueError: a layer is packed in a format that MLX does not
            have; the model has adapters, layers of another quantizer or tensors without values.
        OSError: the folder is not empty, holds the model's own folder or lies in it, or cannot be written; or no
            tokenizer is found.

    Example:
        isqtorch.quantize_(model, "afq4")
        isqtorch.export_mlx(model, "model-mlx", tokenizer)
    """
    from .writer import write_folder  # its tables take a while to import, and few programs need them

    write_folder(model, folder, tokenizer)
