"""Runs recorded launches again under ThreadSanitizer, in another process: `find(launches)`.

That process, this file as a script, knows only the emulator: neither torch nor its threads are in ThreadSanitizer's way.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
FOUND = 66  # the exit status that TSAN_OPTIONS asks for


def find(launches: list[tuple[str, str | None, dict[str, Any]]]) -> str:
    """What ThreadSanitizer says of launches that runner.recording() collected; "" if nothing.

    Raises:
        RuntimeError: the launches could not be run again.
        FileNotFoundError: there is no ThreadSanitizer for this compiler; available() says so before.
    """
    from . import compiler

    plans = [(str(compiler.library(source, "tsan", only)), plan) for source, only, plan in launches]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches"
        path.write_text(json.dumps(plans, default=lambda data: {"base64": base64.b64encode(data).decode()}))
        prepared = compiler.sanitized([sys.executable, str(HERE), str(path)])
        if prepared is None:
            raise FileNotFoundError("no ThreadSanitizer: install Debian's clang-19 and util-linux")
        command, environment = prepared
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, FOUND):
        raise RuntimeError(done.stdout + done.stderr)
    return done.stderr if done.returncode == FOUND else ""


def available() -> bool:
    """Whether find() can work here."""
    from . import compiler

    return compiler.compiler_command() is not None and compiler.sanitized([]) is not None


def _decoded(found: dict[str, Any]) -> Any:
    return base64.b64decode(found["base64"]) if "base64" in found else found


def _replay(path: Path) -> None:
    sys.path.insert(0, str(HERE.parents[2]))
    from emulator.metal.machine import Machine, bound_memory

    machines: dict[str, Machine] = {}
    for library, plan in json.loads(path.read_text(), object_hook=_decoded):
        if library not in machines:
            machines[library] = Machine(Path(library))
        machine = machines[library]
        machine.set_options(workers=2)
        with bound_memory(machine, plan) as (addresses, _):
            machine.kernels[plan["kernel"]].launch(addresses, plan["threads"], plan["group"])


if __name__ == "__main__":
    _replay(Path(sys.argv[1]))
