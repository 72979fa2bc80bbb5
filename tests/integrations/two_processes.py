"""Scripts that two processes run together over gloo: how a test starts them, and how they end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn


def run_two(script: Path, *arguments: str, timeout: int) -> str:
    """What `script` prints, run by two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    done = subprocess.run(
        [*command, "--master-port", str(port), str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def leave() -> NoReturn:
    """End this process without Python's shutdown.

    gloo's threads may still let go of tensors then, which ends the process by std::terminate, with
    destroy_process_group and without (pytorch/pytorch#179291, #190489).
    """
    sys.stdout.flush()
    os._exit(0)
