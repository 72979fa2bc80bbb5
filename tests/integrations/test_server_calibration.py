"""Calibration with the real traffic over HTTP, and the same in Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, PROMPT, Server, chat_model, serving

import isqtorch

pytest.importorskip("openai")
pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), "--save-dir", str(folder)) as running:
        yield running


def post(server: Server, step: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    return server.ask(f"/calibration/{step}", body or {})


def test_from_traffic_to_weights_and_back(server: Server, folder: Path) -> None:
    """The packed bytes are those that the saved importance matrix gives to the original model."""
    before = server.text(PROMPT, 24)
    assert server.ask("/calibration/status")[1] == {
        "collecting": False, "tokens": 0, "isq": "4", "can_roll_back": False, "can_save": True
    }  # fmt: skip
    assert post(server, "start")[1]["collecting"]
    assert post(server, "apply")[0] == 409  # nothing was asked since
    assert server.text(PROMPT, 24) == before  # watching changes no reply
    for number in range(4):
        server.text(f"{PROMPT} {number}", 40)
    status = server.ask("/calibration/status")[1]
    assert status["collecting"] and status["tokens"] > 150
    status, report = post(server, "apply", {"isq": "q2k", "save": "first"})
    assert status == 200, report
    assert report["requested"] == "q2k" and "q2k" in {layer["stored"] for layer in report["layers"]}
    assert sorted(path.name for path in folder.iterdir()) == ["first"]
    calibrated = server.text(PROMPT, 24)
    assert calibrated != before
    status = server.ask("/calibration/status")[1]
    assert not status["collecting"] and status["isq"] == "q2k" and status["can_roll_back"]

    saved = isqtorch.load(folder / "first").model
    made = isqtorch.load(MODEL, "q2k", imatrix=folder / "first/imatrix.gguf", progress=False).model
    plain = isqtorch.load(MODEL, "q2k", progress=False).model
    name = "model.layers.3.mlp.down_proj"
    packed = [model.get_submodule(name).state_dict() for model in (saved, made, plain)]
    equal = [all(torch.equal(packed[0][key], other[key]) for key in packed[0]) for other in packed[1:]]
    assert equal == [True, False]  # the importance matters

    status, answer = post(server, "rollback")
    assert status == 200 and answer["isq"] == "4" and not answer["can_roll_back"]
    assert server.text(PROMPT, 24) == before
    assert post(server, "rollback")[0] == 409


def test_steps_out_of_order(server: Server, folder: Path) -> None:
    for step in ("stop", "apply", "rollback"):
        status, answer = post(server, step)
        assert status == 409, (step, answer)
    assert post(server, "start")[0] == 200
    for step in ("start", "rollback"):
        status, answer = post(server, step)
        assert status == 409 and "/calibration/stop" in answer["error"]["message"], (step, answer)
    status, answer = server.ask("/re_isq", {"isq": "q8_0"})
    assert status == 409 and "/calibration/stop" in answer["error"]["message"]
    server.text(PROMPT, 4)
    for wrong in ("../x", ".x", "a/b", "", "x" * 65, 7, ["x"]):
        status, answer = post(server, "apply", {"save": wrong})
        assert status == 400 and "save must be" in answer["error"]["message"]
    (folder / "taken").mkdir(exist_ok=True)
    assert post(server, "apply", {"save": "taken"})[0] == 409
    assert post(server, "apply", {"isq": "q4z"})[0] == 400
    assert post(server, "apply", {"source": "/etc"})[0] == 400
    assert post(server, "apply", {"path": "/etc"})[0] == 400
    assert post(server, "start", {"x": 1})[0] == 400
    assert server.ask("/calibration/status")[1]["collecting"]  # none of these has ended it
    assert not post(server, "stop")[1]["collecting"]
    assert server.ask("/re_isq", {"isq": "4"})[0] == 200


def test_the_rules_of_access_are_those_of_re_isq(server: Server) -> None:
    for step in ("start", "stop", "apply", "rollback"):
        assert server.ask(f"/calibration/{step}", {}, {"Origin": "http://evil.example"})[0] == 403
        assert server.ask(f"/calibration/{step}", {}, {"Host": "evil.example"})[0] == 403
        assert server.ask(f"/calibration/{step}")[0] == 405  # a GET changes nothing


def test_a_model_loaded_as_it_is_comes_back(tmp_path: Path) -> None:
    """From float weights to packed ones and back; without a folder nothing can be written."""
    from serving import start

    running = start(tmp_path, "-m", str(chat_model(tmp_path)), "--port", "0")
    try:
        before = running.text(PROMPT, 60)
        assert post(running, "start")[0] == 200
        running.text(PROMPT, 60)
        status, answer = post(running, "apply")
        assert status == 400 and "say which format" in answer["error"]["message"]
        status, answer = post(running, "apply", {"isq": "q4k", "save": "x"})
        assert status == 400 and "--save-dir" in answer["error"]["message"]
        assert post(running, "apply", {"isq": "q2k"})[0] == 200
        assert running.text(PROMPT, 60) != before
        assert post(running, "rollback")[1]["isq"] is None
        assert running.text(PROMPT, 60) == before
    finally:
        errors = running.end()
    assert "Traceback" not in errors, json.dumps(errors)
