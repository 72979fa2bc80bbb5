"""The page at /: try the model in a browser. It is one file and loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_PAGE = Path(__file__).with_name("page.html")


class Page:
    """The page with its headers: a browser runs the script of this file and no other, and connects to this server only."""

    def __init__(self) -> None:
        self._html = _PAGE.read_text(encoding="utf-8")
        self._headers = {
            "content-security-policy": "; ".join(
                [
                    "default-src 'none'",
                    f"script-src {_hash(self._html, 'script')}",
                    f"style-src {_hash(self._html, 'style')}",
                    "connect-src 'self'",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                ]
            ),
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }

    async def __call__(self, _: Request) -> Response:
        """The answer to a GET of /."""
        return HTMLResponse(self._html, headers=self._headers)


def _hash(html: str, element: str) -> str:
    """The hash of the only element of a kind, as a source of the policy."""
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", html, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
