"""Threads of the CPU operators: the pool by itself, and the operators from several threads, in children, on few and many threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from isqtorch.ops import native

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "tests/threads_driver.cpp", ROOT / "csrc/cpu/thread_pool.cpp", ROOT / "csrc/cpu/usable_cpus.cpp"]
COMPILER = shutil.which("g++")


@pytest.fixture(scope="module", params=["plain", "thread", "address,undefined"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pool's own tests as a program, also with sanitizers."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs g++ and Linux")
    program = tmp_path_factory.mktemp("threads") / "driver"
    flags = "-std=c++17 -O1 -g -Wall -Wextra -Werror -pthread".split()
    if request.param != "plain":
        flags.append(f"-fsanitize={request.param}")
    subprocess.run([COMPILER, *flags, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program)], check=True)
    return program


def test_pool(driver: Path) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "die_after_fork=0 halt_on_error=1"}
    environment.pop("LD_PRELOAD", None)  # the sanitizers of `make sanitize`
    done = subprocess.run([driver], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[-1] == "forked_child"


if native.LIBRARY is None:
    pytest.skip("the operators are not compiled", allow_module_level=True)


def product(threads: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A product of 1024 x 1024 on this many threads, and x."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(seed))
        return torch.ops.isqtorch.linear(x, PACKED, "q4_0"), x
    finally:
        torch.set_num_threads(before)


PACKED = torch.ops.isqtorch.quantize(torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1)), "q4_0")


def test_number_of_threads_may_change_at_any_time() -> None:
    expected, _ = product(1)
    for threads in [2, 1, 4, 3, 64, 2]:
        for _ in range(20):
            assert torch.equal(product(threads)[0], expected)


def test_eight_python_threads() -> None:
    """They share the threads of the pool; none waits for another for ever, and each gets its own results."""
    expected = [product(1, seed)[0] for seed in range(8)]
    results: list[bool] = []

    def work(seed: int) -> None:
        x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(seed))
        good = all(torch.equal(torch.ops.isqtorch.linear(x, PACKED, "q4_0"), expected[seed]) for _ in range(100))
        results.append(good)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == [True] * 8


def run_python(program: str, policy: str | None) -> str:
    """The output of a program in a process of its own with two threads. policy: what idle OpenMP threads do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_WAIT_POLICY", None)
    if policy is not None:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-c", "import os, sys, time, torch, isqtorch\n" + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


SETUP = """
packed = torch.ops.isqtorch.quantize(torch.randn(1024, 1024), "q4_0")
x = torch.randn(3, 1024)
def product(): return torch.ops.isqtorch.linear(x, packed, "q4_0")
expected = product()
"""
every_policy = pytest.mark.parametrize("policy", [None, "passive"])


@every_policy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_computes_with_threads_of_its_own(policy: str | None) -> None:
    """OpenMP's threads are lost in a child, and GNU's OpenMP waits for them for ever."""
    program = """
for _ in range(3):
    child = os.fork()
    if child == 0:
        good = all(torch.equal(product(), expected) for _ in range(50))
        os._exit(0 if good and torch.get_num_threads() == 2 else 1)
    assert all(torch.equal(product(), expected) for _ in range(50))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("done")
"""
    assert run_python(SETUP + program, policy) == "done\n"


@every_policy
def test_interpreter_ends_while_helpers_spin(policy: str | None) -> None:
    program = """
import threading
thread = threading.Thread(target=lambda: [product() for _ in range(50)])
thread.start()
thread.join()
for _ in range(50): product()
print("done")
"""
    assert run_python(SETUP + program, policy) == "done\n"


def test_idle_threads_cost_nothing() -> None:
    program = """
for _ in range(200): product()
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    assert float(run_python(SETUP + program, "passive")) < 0.02


def test_threads_compute_in_the_mode_of_the_caller() -> None:
    """`torch.set_flush_denormal` is for the calling thread; with it, results are the same on one thread and on several."""
    program = """
assert torch.set_flush_denormal(True)
x = torch.full((1, 1024), 1e-38)
torch.set_num_threads(1)
alone = torch.ops.isqtorch.linear(x, packed, "q4_0")
torch.set_num_threads(2)
assert all(torch.equal(torch.ops.isqtorch.linear(x, packed, "q4_0"), alone) for _ in range(200))
print("done")
"""
    assert run_python(SETUP + program, "passive") == "done\n"
