"""The fuzzer finds what it is for, and a few inputs of every target find nothing."""

from __future__ import annotations

from random import Random

import pytest
from fuzz.driver import report, run_target
from fuzz.targets import SHARES, load
from fuzz.worker import run_one, seed_of

FAULTY = "fuzz.faulty"


def kinds_of(first: int, end: int) -> list[str]:
    return [load(FAULTY).make(seed_of(FAULTY, 0, number)) for number in range(first, end)]


def test_crashes_hangs_and_other_exceptions_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    end = 1 + max(kinds_of(0, 40).index(kind) for kind in ("crash", "hang", "other", "long", "refused", "fine"))
    kinds = kinds_of(0, end)
    result = run_target(FAULTY, 0, 0, end, 300)
    assert result.inputs == end
    assert result.accepted == kinds.count("fine") and result.refused == kinds.count("refused")
    found = {key.split(" at ")[0]: (count, first) for key, (count, first, _) in result.faults.items()}
    for key, kind in (
        ("the process ended with status -6", "crash"),
        ("hang after 1 s of work", "hang"),
        ("TypeError", "other"),
        ("a message of 1000000 characters", "long"),
    ):
        assert found[key] == (kinds.count(kind), kinds.index(kind))
    assert not report([result], 0)
    assert f"--target {FAULTY} --only {kinds.index('crash')}" in capsys.readouterr().out


@pytest.mark.parametrize("name", SHARES)
def test_inputs_are_reproducible_and_reach_the_code(name: str) -> None:
    """Some inputs are accepted and some refused: the changes are neither too wild nor without effect."""
    target = load(name)
    assert repr(target.make(seed_of(name, 0, 5))) == repr(target.make(seed_of(name, 0, 5)))
    accepted = [run_one(target, Random(seed))[0] for seed in range(60)]
    assert any(accepted) and (not all(accepted) or name == "report")


def test_the_operators_keep_what_they_promise() -> None:
    for number in range(300):
        assert run_one(load("operators"), seed_of("operators", 1, number))[1] is None
