"""The layers of a model that vLLM will load, described by an empty model of transformers.

vLLM asks about one layer at a time. Mixes, promotions and ties need all layers, and patterns and topologies are written
for the names of transformers.
"""

from __future__ import annotations

import copy
from typing import Any

from isqtorch.integrations.classes import auto_class
from isqtorch.integrations.opening import empty_model
from isqtorch.policy.inventory import inspect_model
from isqtorch.policy.layers import LayerInfo


def layers_of(config: Any) -> list[LayerInfo]:
    """The layers of a configuration's model.

    Raises:
        Exception: of any kind, if transformers has no such model: its classes compute with the configuration.
    """
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    auto, _ = auto_class(config.model_type, config)
    model = empty_model(auto, config)
    return inspect_model(model, model.all_tied_weights_keys).layers
