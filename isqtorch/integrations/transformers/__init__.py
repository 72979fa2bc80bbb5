"""transformers: `from_pretrained(..., quantization_config=isqtorch.IsqConfig("q4k"))` and `save_pretrained`.

Importing this module registers the quantization method "isq". `import isqtorch` imports it once transformers is
imported.
"""

from __future__ import annotations

import re

import transformers

MINIMUM = (5, 23)  # earlier loaders cast weights to the type of the packed placeholder before they are packed

_found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
if _found < MINIMUM:
    raise ImportError(
        f"isqtorch.IsqConfig needs transformers >= {'.'.join(map(str, MINIMUM))}, this is {transformers.__version__}. "
        "Upgrade it, or load the model as it is and use isqtorch.quantize_."
    )

from isqtorch.inplace.host import register_host  # noqa: E402
from isqtorch.modules.savers import register_recorder  # noqa: E402

from .config import IsqConfig  # noqa: E402
from .dtypes import install as answer_dtype  # noqa: E402
from .findings import install as note_findings  # noqa: E402
from .host import TransformersHost, records, tied  # noqa: E402
from .quantized_cache import QuantizedCache, offer_backend  # noqa: E402
from .quantizer import IsqHfQuantizer  # noqa: E402
from .resize import install as follow_resizing  # noqa: E402
from .saving import install as record_when_saving  # noqa: E402
from .stored import install as read_quantized  # noqa: E402
from .ties import follow_ties  # noqa: E402

register_host(TransformersHost())
register_recorder(records)
follow_resizing()
record_when_saving()
read_quantized()
follow_ties(tied)
note_findings()
answer_dtype()
offer_backend()

__all__ = ["IsqConfig", "IsqHfQuantizer", "QuantizedCache"]
