"""export_gguf: write a model as a GGUF file."""

from __future__ import annotations

import os
from typing import Any

from torch import nn


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    name: str | None = None,
    pre_tokenizer: str | None = None,
) -> None:
    """Write a model as a GGUF file, which llama.cpp, Ollama and LM Studio open.

    Packed weights go into the file as they are, so the other program computes with the same numbers. Weights that are
    not packed keep their type; vectors become f32. Of a model with images or sound, the text part is written. The file
    appears under its name when it is complete, and replaces one of that name. At most one weight is copied at a time.

    Args:
        model: a causal language model of transformers, quantized or not.
        path: the file to write.
        tokenizer: the tokenizer, or a processor with one. None: that of the folder that the model was loaded from.
            False: write no tokenizer; only programs that bring their own can use such a file.
        name: the name of the model that programs show. None: the name of the folder or model id.
        pre_tokenizer: llama.cpp's name of the rule by which a byte-level tokenizer splits text, such as "llama-bpe".
            None: it is found by the tokenizer's own rule.

    Raises:
        NotImplementedError: the architecture is not one of those that can be written. The message lists them.
        ValueError: a layer is packed in a format that GGUF does not have; the model has adapters, layers of another
            quantizer or tensors without values; the configuration says what a file cannot say; the tokenizer does not fit the
            model, or is of a kind that cannot be written.
        OSError: the file cannot be written, or no tokenizer is found.

    Example:
        isqtorch.quantize_(model, "q4k")
        isqtorch.export_gguf(model, "model-q4k.gguf", tokenizer)
    """
    from .writer import write_model  # its tables take a while to import, and few programs need them

    write_model(model, path, tokenizer, name, pre_tokenizer)
