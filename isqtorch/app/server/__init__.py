"""An OpenAI-compatible server for one model, whose format can be changed while it is serving.

Needs `isqtorch[serve]`; otherwise the import raises an ImportError that says so.
"""

from __future__ import annotations

from isqtorch.integrations.opening import needs_transformers

with needs_transformers():
    from transformers.utils.import_utils import is_serve_available

if not is_serve_available():
    raise ImportError("the server needs fastapi, uvicorn and openai: pip install 'isqtorch[serve]'")

from .app import build_app
from .reach import Reach, api_key, bind, check_exposure
from .served import Served
from .transport import serve

__all__ = ["Reach", "Served", "api_key", "bind", "build_app", "check_exposure", "serve"]
