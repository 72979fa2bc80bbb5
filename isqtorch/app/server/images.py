"""Images in messages: data URLs only, so that a request opens neither a file nor a connection, decoded within limits.

Pillow reads the size of an image before its pixels. So a small file that would become gigabytes is refused in time.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

from .body import kind

MAX_IMAGES = 16  # of a request
MAX_PIXELS = 1 << 24  # of each: 4096 x 4096
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of a GIF, the first picture
_DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)
_DETAILS = (None, "auto")


def check_image(part: dict[str, Any], where: str) -> None:
    """ValueError unless a part of a message is an image in a data URL."""
    image = part.get("image_url")
    if not isinstance(image, dict) or not isinstance(image.get("url"), str):
        raise ValueError(f'{where}.image_url must be {{"url": "data:image/png;base64,..."}}, got {kind(image)}')
    if not _DATA_URL.match(image["url"]):
        raise ValueError(
            f"{where}.image_url.url must be a data URL, such as data:image/png;base64,...: this server opens no addresses "
            f"and no files, got {image['url'][:40]!r}"
        )
    if image.get("detail") not in _DETAILS:
        raise ValueError(f"{where}.image_url.detail can be 'auto': the model has one way to see an image")


def is_image(part: Any) -> bool:
    """Whether a part of a message is an image."""
    return isinstance(part, dict) and part.get("type") == "image_url"


def taken_out(messages: list[dict[str, Any]]) -> list[Any]:
    """Decode the images of messages in the form of transformers, and leave a mark in the place of each.

    Returns:
        Pictures of Pillow in RGB, in the order of the messages.

    Raises:
        ValueError: there are too many, or one is damaged, too large, or of another format.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if len(parts) > MAX_IMAGES:
        raise ValueError(f"the messages have {len(parts)} images; a request can have {MAX_IMAGES}")
    return [_decoded(part.pop("url"), f"image {number}") for number, part in enumerate(parts, 1)]


def _decoded(url: str, where: str) -> Any:
    from PIL import Image, ImageOps

    try:
        raw = base64.b64decode(url[url.index(",") + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where} is not base64: {error}") from None
    try:
        picture = Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Exception as error:  # damaged files raise anything, also a warning of Pillow's about the size
        raise ValueError(f"{where} is no image in one of the formats {', '.join(_FORMATS)}: {error}") from None
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{where} has {width} x {height} pixels; an image can have up to {MAX_PIXELS}")
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")  # as transformers reads files
    except Exception as error:
        raise ValueError(f"{where} is a damaged image: {error}") from None
