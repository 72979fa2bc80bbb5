"""What the tests with vLLM share. They are run by `make test-vllm`, and fail without it."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from vllm_engine import ask_vllm`

from quiet import quiet as quiet  # a fixture
