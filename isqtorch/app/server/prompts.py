"""From a request to the tokens of its prompt, and to the pixels of its images. All of this runs on the reading thread."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import Modality

from .images import taken_out
from .served import ApiError, Served


def check_template(served: Served, body: dict[str, Any]) -> None:
    """ApiError if the model has no chat, or a request sets what only the server may set."""
    writer = served.loaded.chat_writer
    own = inspect.signature(writer.apply_chat_template).parameters
    for name in body.get("chat_template_kwargs", {}):
        # an argument of the method itself (a template given by the client could run forever), or what it passes on
        if name in own or name in ("messages", "conversations"):
            raise ApiError(400, f"chat_template_kwargs must not hold {name!r}")
    if not writer.chat_template:
        raise ApiError(400, f"{served.name!r} is a base model without a chat template; use /v1/completions")


def rendered(served: Served, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
    """The tokens of a conversation, and what the model reads of its images."""
    loaded = served.loaded
    settings = {"add_generation_prompt": True, "tools": body.get("tools"), **body.get("chat_template_kwargs", {})}
    try:
        if loaded.sees:
            return _with_images(served, messages, settings)
        for i, message in enumerate(messages):
            if any(part.get("type") == "image_url" for part in _parts(message)):
                raise ApiError(400, f"messages[{i}] has an image, and {served.name!r} reads text only")
        plain = ChatCompletionHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
        tokenizer = loaded.tokenizer
        served.check_length(tokenizer.apply_chat_template(plain, tokenize=False, **settings))
        inputs = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True, return_tensors="pt", **settings)
    except ApiError:
        raise
    except Exception as error:  # templates are programs: they can raise anything for messages they do not expect
        raise ApiError(
            400, f"the model's chat template does not take this request: {type(error).__name__}: {error}"
        ) from error
    return inputs.to(loaded.model.device)


def _with_images(served: Served, messages: list[dict[str, Any]], settings: dict[str, Any]) -> Any:
    """The same by the processor of a model that sees; its templates expect a list of parts, also of text alone.

    `processor.apply_chat_template` would pass settings that the template does not know on to the processor, where a
    client could ask for images of any size. So it only writes the text here.
    """
    processor, model = served.loaded.processor, served.loaded.model
    plain = ChatCompletionHandler.get_processor_inputs_from_messages(messages, Modality.VLM)
    try:
        images = taken_out(plain)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    text = processor.apply_chat_template(plain, tokenize=False, **settings)
    served.check_length(text)
    own = served.loaded.template_settings(text)
    if not images:
        return served.loaded.tokenizer(text, return_tensors="pt", verbose=False, **own).to(model.device)
    return processor(text=[text], images=[images], return_tensors="pt", **own).to(model.device, model.dtype)


def tokens_of(served: Served, prompt: str | list[int]) -> Any:
    """The tokens of a text, or of a list of token ids."""
    device = served.loaded.model.device
    if isinstance(prompt, str):
        served.check_length(prompt)
        return served.loaded.tokenizer(prompt, return_tensors="pt", verbose=False).to(device)
    vocabulary = served.loaded.model.config.get_text_config().vocab_size
    outside = next((token for token in prompt if token >= vocabulary), None)
    if outside is not None:
        raise ApiError(400, f"the prompt has token {outside}; the vocabulary has {vocabulary}")
    ids = torch.tensor([prompt], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) and not message.get("tool_calls") else []
