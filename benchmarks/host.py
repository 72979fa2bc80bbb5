"""The machine, and what of the peers it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from isqtorch.cli.doctor import cpu, machine_facts
from isqtorch.ops import cpu_info

from . import output
from .measure import Session, Tier
from .peers import Unavailable
from .peers.ourselves import ENVIRONMENT
from .peers.process import PeerProcess
from .targets import TIERS

ROOT = Path(__file__).resolve().parents[1]


def tiers(skipped: list[str]) -> list[Tier]:
    """The best instruction set of this machine first, then the older ones that there is a build of ggml for.

    ISQTORCH_GGML_LIB names ggml's folder (or llama-cpp-python is installed), ISQTORCH_GGML_LIB_AVX512 and _AVX2 name those of builds
    that use no more than that.
    """
    order, features = list(TIERS), " ".join(cpu()["features"])
    best = next((name for name in order if name in features), "")
    ggml: PeerProcess | None = None
    label = best
    try:
        ggml = PeerProcess("ggml")
        broken = ggml.probe("q4_0")
        skipped += broken
        if broken or best not in ggml.version:
            label = f"{best}, ggml without it"  # no target: that would be an easy win
    except Unavailable as reason:
        skipped.append(f"ggml: {reason}")
    found = [Tier(label, ggml)]
    supported = cpu_info().isa_supported
    for name in order[order.index(best) + 1 :] if best else ():
        variable = f"ISQTORCH_GGML_LIB_{name.upper()}"
        levels = [level for level in supported if level == name or (name == "avx512" and level.startswith(name))]
        try:
            if variable not in os.environ:
                raise Unavailable(f"{variable} is not set")
            if not levels:
                raise Unavailable("our kernels have no such level")
            older = PeerProcess("ggml", {"ISQTORCH_GGML_LIB": os.environ[variable]})
            ours = PeerProcess("ourselves", {"ISQTORCH_CPU_ISA": levels[-1], **ENVIRONMENT[name]}, sys.executable)
            found.append(Tier(name, older, ours))
        except Unavailable as reason:
            skipped.append(f"ggml kept to {name}: {reason}")
    return found


def with_peer(name: str, session: Session) -> None:
    """Measure all formats of a peer, if it is there."""
    try:
        peer = PeerProcess(name)
    except Unavailable as reason:
        session.results.skipped.append(f"{name}: {reason}")
        return
    session.results.facts.setdefault("peers", {})[peer.name] = peer.version
    for fmt in peer.formats:
        try:
            session.peer(peer, fmt)
        except Unavailable as reason:
            session.results.skipped.append(f"{peer.name} {fmt}: {reason}")
    peer.close()


def facts(tiers: list[Tier]) -> list[str]:
    """Lines for people: processor, caches, versions."""
    lines = [*machine_facts(), f"caches: {', '.join(_caches()) or 'unknown'}"]
    lines.append(f"CPU features: {' '.join(cpu()['features']) or 'unknown'}")
    lines.append(f"isqtorch commit: {commit()}")
    lines.append(f"compiler here: {(_output(os.environ.get('CXX', 'c++'), '--version') or 'none').splitlines()[0]}")
    lines += [f"ggml for {tier.name}: {tier.ggml.version}" for tier in tiers if tier.ggml]
    return lines


def commit() -> str:
    """The version of this source tree."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty") or "unknown"


def slug() -> str:
    """The processor's name as part of a file name."""
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", " ", machine_facts()[0].split(",")[0])
    return output.slug(name) or "cpu"


def _caches() -> list[str]:
    """Level, kind and size, as Linux tells them."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found.append(f"L{level} {kind.lower()} {size}")
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
