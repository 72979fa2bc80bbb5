"""PEFT: adapters on quantized models, and merging them into the packed weights.

Most adapters need nothing from here to be trained: QuantLinear is a subclass of nn.Linear, so `get_peft_model` accepts
it, and gradients pass through it. Merging needs `enable`, because nothing can be added to packed bytes.

    import isqtorch.integrations.peft

    isqtorch.integrations.peft.enable()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    ...
    model = model.merge_and_unload()

A merge runs PEFT's own code on a float layer, and packs the result once (`layers.py`). The float weight is that of the
checkpoint where it is known, else the decoded one (`floats.py`). `session.py` says what was lost. `inject.py` prepares
the layers of adapters when they are made, and `saved.py` those that are trained in full.
"""

from .inject import enable
from .session import merging

__all__ = ["enable", "merging"]
