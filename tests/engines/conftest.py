"""What the tests with other programs share. They are run by `make test-engines`, and fail without these programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from llama import ask`


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Neither progress bars nor advice from transformers."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)
