"""What the tests with other programs share. They are run by `make test-engines`, and fail without these programs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from llama import ask`

from quiet import quiet as quiet  # a fixture
