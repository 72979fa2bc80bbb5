"""Inputs for any model: ids of tokens, pictures, sounds. What a model takes, its own `forward` says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_TOKENS = 12
_FIRST_ID = 5  # smaller ones are special


def candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Arguments for a call of the model, the most likely first. Those that do not fit raise an error in the model."""
    takes = inspect.signature(model.forward).parameters
    config = model.config
    generator = torch.Generator().manual_seed(1)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = (torch.arange(_TOKENS) % 7 + _FIRST_ID)[None]
    extra = {}
    if "decoder_input_ids" in takes:
        extra["decoder_input_ids"] = ids
    text = {"input_ids": ids, **extra}
    channels, size = _value(config, "num_channels", 3), _value(config, "image_size", 64)
    if isinstance(size, (list, tuple)):
        size = size[0]
    pictures = {"pixel_values": floats(1, channels, size, size)}
    sounds = _sounds(config, floats)
    if "input_ids" in takes:
        yield text
        if "pixel_values" in takes:
            yield {**text, **pictures}
    image = _value(config, "image_token_index", _value(config, "video_token_index", None))
    queries = _value(config, "num_query_tokens", None)
    if image is not None and queries is not None:  # a place in the text for each query
        placed = torch.cat([torch.full((1, queries), image), ids], 1)
        known = _known(takes, config, placed, floats)
        for values in (pictures, {"pixel_values": floats(1, 4, channels, size, size)}):
            yield {
                name: value for name, value in {**known, **text, "input_ids": placed, **values}.items() if name in takes
            }
    if "pixel_values" in takes:
        yield pictures
        yield {**pictures, **extra}
        for side in (32, 224, 384):
            yield {"pixel_values": floats(1, channels, side, side)}
        for frames in (_value(config, "num_frames", 4), 2):  # a video; two pictures to compare
            yield {"pixel_values": floats(1, frames, channels, size, size)}
    for name in ("input_features", "input_values"):
        if name in takes:
            for sound in sounds[name]:
                yield {name: sound, **extra}
                if "input_ids" in takes:
                    yield {name: sound, **text}
    if "grid_thw" in takes:  # patches of a picture of 4 x 4 patches, one in each row
        patch = channels * _value(config, "temporal_patch_size", 1) * _value(config, "patch_size", 14) ** 2
        for name in ("hidden_states", "pixel_values"):
            if name in takes:
                yield {name: floats(16, patch), "grid_thw": torch.tensor([[1, 4, 4]])}
    if "past_values" in takes:  # of time series
        series = floats(1, _value(config, "context_length", 32), _value(config, "num_input_channels", 1))
        yield {"past_values": series}
    known = _known(takes, config, ids, floats) | {key: value[0] for key, value in sounds.items()}
    known |= {**text, **pictures}
    yield {name: value for name, value in known.items() if name in takes}
    required = _required(takes, config, ids, floats)
    if required:
        yield required
        for given in (
            pictures,
            {"pixel_values_videos": floats(1, _value(config, "num_frames", 4), channels, size, size)},
        ):
            better = {**required, **{name: value for name, value in given.items() if name in required}}
            yield {**better, **extra}
            if "input_ids" in takes:
                yield {**better, **text}
    for name in ("inputs_embeds", "hidden_states"):
        if name in takes:
            yield {name: floats(1, _TOKENS, _hidden(config))}


def _known(takes: Mapping[str, inspect.Parameter], config: Any, ids: Tensor, floats: Any) -> dict[str, Tensor]:
    """Arguments that few models take."""
    length = _value(config, "context_length", 32) or _value(config, "prediction_length", 32)
    length += max(_value(config, "lags_sequence", [0]))
    future = _value(config, "prediction_length", 8)
    times = _value(config, "num_time_features", 0)
    return {
        "qformer_input_ids": ids,
        "bbox": torch.zeros(1, _TOKENS, _value(config, "dim_bbox", 4), dtype=torch.long),
        "visual_feats": floats(1, 4, _value(config, "visual_feat_dim", 64)),
        "visual_pos": floats(1, 4, _value(config, "visual_pos_dim", 4)),
        "past_values": floats(1, length),
        "past_time_features": floats(1, length, times),
        "past_observed_mask": torch.ones(1, length),
        "future_values": floats(1, future),
        "future_time_features": floats(1, future, times),
        "states": floats(1, 4, _value(config, "state_dim", 17)),
        "actions": floats(1, 4, _value(config, "act_dim", 4)),
        "rewards": floats(1, 4, 1),
        "returns_to_go": floats(1, 4, 1),
        "timesteps": torch.arange(4)[None],
        "encoder_hidden_states": floats(1, _TOKENS, _value(config, "encoder_hidden_size", _hidden(config))),
        "query_embeds": floats(1, 4, _hidden(config)),
    }


def _required(takes: Mapping[str, inspect.Parameter], config: Any, ids: Tensor, floats: Any) -> dict[str, Tensor]:
    """All arguments without a default. The end of a name says what kind of values it takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {}
    for name, parameter in takes.items():
        if parameter.default is not inspect.Parameter.empty or parameter.kind not in kinds:
            continue
        if name.endswith("ids"):
            found[name] = ids
        elif name.endswith("mask"):
            found[name] = torch.ones_like(ids)
        else:
            found[name] = floats(1, _TOKENS, _hidden(config))
    return found


def _hidden(config: Any) -> int:
    names = ("hidden_size", "d_model", "embed_dim", "dim")
    return next((size for size in (_value(config, name, None) for name in names) if type(size) is int), 256)


def _sounds(config: Any, floats: Any) -> dict[str, list[Tensor]]:
    bins, positions = _value(config, "num_mel_bins", 80), _value(config, "max_source_positions", 50)
    size = _value(config, "feature_size", bins)
    length = _value(config, "max_length", 64)
    return {
        "input_features": [
            floats(1, bins, 2 * positions),
            floats(1, 64, size),
            floats(1, 64, 2 * bins),
            floats(1, 1, 64, bins),
        ],
        "input_values": [floats(1, 8000), floats(1, 1, 8000), floats(1, length, bins)],
    }


def _value(config: Any, name: str, otherwise: Any) -> Any:
    """A value of the configuration, or of one of its parts."""
    parts = [config, *(getattr(config, each, None) for each in getattr(config, "sub_configs", {}))]
    values = (getattr(part, name, None) for part in parts if part is not None)
    return next((value for value in values if value is not None), otherwise)
