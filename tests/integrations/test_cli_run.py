"""`isqtorch run` and `isqtorch quantize`: text, chat, commands, interrupts, and what is written."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")


import isqtorch  # noqa: E402
from isqtorch.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/demo_model/model")
PROMPT = "The function returns"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "demo-chat"
    shutil.copytree(MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run") / "demo-q4k"
    assert main(["quantize", "-m", MODEL, "--isq", "q4k", "-o", str(folder)]) == 0
    return str(folder)


def reply(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["run", *argv, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def lines(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Standard input, not a terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


# ---- packed keys and values ------------------------------------------------------------------------------------------


def test_a_reply_with_packed_keys_and_values(packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    from isqtorch.integrations.transformers import quantized_cache

    few = ("-m", packed, "--prompt", PROMPT, "--max-new-tokens", "8", "--temperature", "0")
    made: list[tuple[str, str]] = []
    init = quantized_cache.QuantizedCache.__init__

    def watched(self: Any, config: Any, *formats: str) -> None:
        init(self, config, *formats)
        made.append(self.formats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_cache.QuantizedCache, "__init__", watched)
        plain = reply(capsys, *few)["text"]
        assert not made
        assert reply(capsys, *few, "--kv", "8")["text"] == plain
        assert made[-1] == ("q8_0", "q8_0")
        reply(capsys, *few, "--kv", "q8_0/q4_0")
        assert made[-1] == ("q8_0", "q4_0")


@pytest.mark.parametrize("command", ["run", "serve", "bench"])
def test_wrong_formats_of_keys_and_values(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "-m", MODEL, "--kv", "q4k", *["--prompt", "x"] * (command == "run")]) == 1
    assert "--kv: keys and values cannot be in 'q4k'. There are q8_0, q5_1" in capsys.readouterr().err


def test_a_model_without_keys_and_values_is_refused_before_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isqtorch.app.model import LoadedModel

    config = transformers.AutoConfig.for_model("mamba", vocab_size=4096, hidden_size=32, num_hidden_layers=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(packed, file), tmp_path)
    monkeypatch.setattr(LoadedModel, "_load", lambda self, isq: pytest.fail("it was read"))
    assert main(["run", "-m", str(tmp_path), "--kv", "8", "--prompt", "x"]) == 1
    assert "--kv q8_0: MambaForCausalLM keeps no keys and values" in capsys.readouterr().err


# ---- one prompt ------------------------------------------------------------------------------------------------------


def test_the_text_is_the_models(packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same, quantized now or before, streamed or as JSON, and as `generate` gives it."""
    few = ("--prompt", PROMPT, "--max-new-tokens", "12")
    now = reply(capsys, "-m", MODEL, "--isq", "q4k", *few)
    assert now["text"] == reply(capsys, "-m", packed, *few)["text"]
    assert (now["prompt_tokens"], now["generated_tokens"], now["finish"]) == (3, 12, "length")
    assert now["prompt_tokens_per_second"] > 0 and now["tokens_per_second"] > 0

    assert main(["run", "-m", packed, *few]) == 0
    out, err = capsys.readouterr()
    assert out == now["text"] + "\n"
    assert "base model without a chat template" in err and "generation: 12 tokens" in err

    tokenizer = transformers.AutoTokenizer.from_pretrained(packed)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed).eval()
    isqtorch.optimize_(model)  # as the command does: in bf16, sums of attention have another order
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert now["text"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_standard_input_is_the_prompt(
    packed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines(monkeypatch, PROMPT + "\n")
    piped = reply(capsys, "-m", packed, "--max-new-tokens", "6")
    assert piped["text"] == reply(capsys, "-m", packed, "--max-new-tokens", "6", "--prompt", PROMPT)["text"]


def test_piped_text_that_begins_with_a_slash_is_text(
    packed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("/exit", "/help me to open files\n/clear"):
        lines(monkeypatch, text + "\n")
        piped = reply(capsys, "-m", packed, "--max-new-tokens", "6")
        assert piped["text"] == reply(capsys, "-m", packed, "--max-new-tokens", "6", "--prompt", text)["text"]
        assert piped["prompt_tokens"] > 1


def test_importance_from_a_chat(
    chat_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/imatrix collects, writes, and is used by the next change of the format."""

    file = tmp_path / "chat.gguf"
    said = [
        f"/imatrix {file}", "/imatrix", "/imatrix", f"/imatrix {file}", "hello", f"/imatrix {file}", "/re_isq nonsense",
        "/re_isq q2k", "hello", "/re_isq q3k", "/help",
    ]  # fmt: skip
    lines(monkeypatch, "\n".join(said))
    assert main(["run", "-m", chat_model, "--isq", "8", "--interactive", "--max-new-tokens", "12"]) == 0
    err = capsys.readouterr().err
    assert "nothing has been collected: /imatrix begins" in err and "collected already" in err
    assert "nothing was said since /imatrix" in err and "unknown format 'nonsense'" in err
    assert err.count("tokens of this chat") == 1 and err.count("57 of 57 weights quantized") == 2
    assert "/imatrix FILE: write what was collected so far" in err
    im = isqtorch.read_imatrix(file)
    assert len(im) > 50 and f"wrote {file}" in err


def test_sampling(packed: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("-m", packed, "--prompt", PROMPT, "--max-new-tokens", "12")
    hot = [reply(capsys, *few, "--temperature", "1.5", "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert hot[0] == hot[1] != hot[2]
    assert reply(capsys, *few, "--temperature", "0")["text"] == reply(capsys, *few)["text"]
    assert reply(capsys, *few, "--top-p", "0.001", "--seed", "1")["text"] == reply(capsys, *few)["text"]


def test_the_chat_template_is_used(chat_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("-m", chat_model, "--isq", "4", "--prompt", "hello", "--max-new-tokens", "4")
    plain = reply(capsys, *few)["prompt_tokens"]
    assert reply(capsys, *few, "--system", "be brief")["prompt_tokens"] > plain > 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "x", "--interactive"], "not for a chat"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--top-p", "2"], "--top-p"),
        (["--prompt", "x", "--system", "y"], "takes no --system"),
        (["--prompt", "x", "--topology", "t.yaml"], "need --isq"),
        (["--prompt", "x", "--isq", "q4z"], "q4z"),
        (["--prompt", "x", "--device", "abacus"], "abacus"),
        (["--prompt", "word " * 2000], "the context of the model is 1024"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-m", MODEL, *argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("isqtorch: ")


def test_no_such_model_offline(tmp_path: Path) -> None:
    """A model id is looked for in the cache only, and the line says what to do."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "isqtorch", "run", "-m", "nobody/nothing", "--isq", "4", "--prompt", "x"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert "cannot load 'nobody/nothing'" in done.stderr.splitlines()[-1]
    assert "or give a local folder" in done.stderr and "Traceback" not in done.stderr


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat_commands(chat_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat remembers, forgets on /clear, changes its format, and survives what is wrong."""
    said = [
        "hello",
        "hello",
        "/clear",
        "hello",
        "/re_isq q2k",
        "/re_isq nonsense",
        "/nonsense",
        "",
        "hello",
        "/exit",
        "hello",
    ]
    lines(monkeypatch, "\n".join(said))
    assert main(["run", "-m", chat_model, "--isq", "8", "--interactive", "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert "forgotten" in err and "'/nonsense' is not a command" in err
    assert "unknown format 'nonsense'" in err and "57 of 57 weights quantized" in err
    assert "generation: 24 tokens" in err  # four replies; what comes after /exit is not read
    assert out


def test_conversation_remembers_and_forgets(chat_model: str) -> None:
    from isqtorch.app.chat import Conversation, Sampling
    from isqtorch.app.model import LoadedModel

    talk = Conversation(LoadedModel(chat_model, "4"), Sampling(max_new_tokens=6), system="be brief")
    first = talk.say("hello")
    second = talk.say("and then?")
    assert second.prompt_tokens > first.prompt_tokens + 6
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    with pytest.raises(ValueError, match="context"):
        talk.say("word " * 2000)
    assert len(talk.messages) == 4  # a failed turn is not remembered
    talk.clear()
    assert talk.say("hello").text == first.text

    old = talk.loaded.model
    report = talk.loaded.requantize("q8_0")
    assert report.bits_per_weight > 8 and talk.loaded.model is old
    talk.messages = [{"role": "tool", "content": "x"}]
    with pytest.raises(ValueError, match="template refuses: no tools"):
        talk.say("hello")


def test_requantize_reads_the_checkpoint_again(packed: str) -> None:
    """From 2 bits to 8 the model is the one quantized to 8 directly; a packed checkpoint cannot give more than it has."""
    from isqtorch.app.model import LoadedModel

    options = {"topology": {"0": "q6k"}}
    changed, fresh = LoadedModel(MODEL, "q2k", options=options), LoadedModel(MODEL, "q8_0", options=options)
    report = changed.requantize("8")
    assert report["model.layers.0.mlp.up_proj"].stored == "q6k"  # options stay in force
    state, want = changed.model.state_dict(), fresh.model.state_dict()
    assert all(state[name].equal(want[name]) for name in want)
    with pytest.raises(ValueError, match="q9"):
        changed.requantize("q9")
    assert changed.isq == "8"

    changed.requantize("q4_0", "stored")
    assert any("their errors stay" in note for note in changed.report.notes) and changed.isq == "q4_0"

    stored = LoadedModel(packed)
    assert any("their errors stay" in note for note in stored.requantize("q8_0").notes)
    assert stored.model.model.layers[0].mlp.up_proj.format == "q8_0"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_the_reply_and_eof_the_chat(packed: str) -> None:
    """At a terminal: the interrupted reply is marked, the chat goes on, and Ctrl-D ends it with status 0."""
    terminal, end = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = [sys.executable, "-m", "isqtorch", "run", "-m", packed, "--max-new-tokens", "900"]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=env, start_new_session=True)
    os.close(end)
    seen = ""

    def until(text: str, again: Callable[[], None] = lambda: None) -> None:
        """Read until the text has come, doing `again` what may have been missed."""
        nonlocal seen
        give_up = time.monotonic() + 300
        while text not in seen:
            assert time.monotonic() < give_up, seen
            if select.select([terminal], [], [], 2)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
            else:
                again()
        seen = seen.partition(text)[2]

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)

    try:
        until("> ")
        os.write(terminal, b"/he\t\n")  # Tab completes a command
        until("/exit: end the chat")
        until("> ")
        os.write(terminal, b"\x10\n")  # Ctrl-P, the key above: the line before
        until("/exit: end the chat")
        until("> ")
        os.write(terminal, b"The function returns\n")
        until("\n")
        until("\n")  # some text has come
        interrupt()
        until("[interrupted]")
        until("> ")
        interrupt()  # at the prompt: the line is dropped
        until("> ", interrupt)  # readline does not notice a signal between its prompt and its wait for a key
        os.write(terminal, b"\x04")
        until("generation:")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


# ---- quantize --------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_whole_model(packed: str) -> None:
    names = {path.name for path in Path(packed).iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    config = json.loads(Path(packed, "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "isq" and set(config["layers"].values()) == {"q4k", "q6k"}
    modes = {path.stat().st_mode & 0o777 for path in Path(packed).iterdir()}
    assert modes == {Path(packed).stat().st_mode & 0o666}  # as the user's umask says
    assert not [path for path in Path(packed).parent.iterdir() if path.name.startswith(".")]


def test_quantize_replaces_only_what_it_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other, source = tmp_path / "out", tmp_path / "other", tmp_path / "source"
    command = ["quantize", "-m", MODEL, "--isq", "q2k", "-o", str(out)]
    assert main(command) == 0
    old = (out / "model.safetensors").read_bytes()
    assert main(command) == 1 and "--force" in capsys.readouterr().err
    (out / "mine.txt").write_text("x")
    assert main([*command[:-3], "q8_0", "-o", str(out), "--force"]) == 0
    assert (out / "model.safetensors").stat().st_size > 2 * len(old) and (out / "mine.txt").read_text() == "x"

    other.mkdir()
    (other / "thesis.txt").write_text("x")
    assert main([*command[:-1], str(other), "--force"]) == 1
    assert "is not a model folder" in capsys.readouterr().err
    shutil.copytree(MODEL, source)
    assert main([*command[:-1], str(source), "--force"]) == 1
    assert "isqtorch did not write" in capsys.readouterr().err
    assert main(["quantize", "-m", str(source), "--isq", "4", "-o", str(source), "--force"]) == 1
    assert "is the model itself" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other", "source"}


def test_a_failed_quantize_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert main(["quantize", "-m", MODEL, "--isq", "q2k", "-o", str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_the_library_load_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with `isqtorch.checkpoint.save`'s file in it is a MODEL as well."""

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    isqtorch.quantize_(model, "q4k", progress=False)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    isqtorch.checkpoint.save(model, tmp_path / "model.safetensors")
    few = ("--prompt", PROMPT, "--max-new-tokens", "6")
    assert reply(capsys, "-m", str(tmp_path), *few)["text"] == reply(capsys, "-m", MODEL, "--isq", "q4k", *few)["text"]
    assert main(["run", "-m", str(tmp_path), "--isq", "4", *few]) == 1
    assert "quantized already" in capsys.readouterr().err


# ---- the guide -------------------------------------------------------------------------------------------------------


def test_the_guides_commands_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one folder; `serve` is started by the server's tests. Benchmarks are shorter here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", guide, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if re.search(r"(^|\| )isqtorch (?!serve)", line)]
    assert {line.split("isqtorch ")[1].split()[0] for line in commands} == {"quantize", "run", "plan", "bench"}
    for line in commands:
        piped, _, command = line.rpartition("|")
        monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(shlex.split(piped)[1:])))
        argv = shlex.split(command, comments=True)[1:]
        if argv[0] == "bench":
            argv += ["--isq", "q8_0", "--prompt-len", "16", "--gen-len", "4", "--repeat", "1"]
        assert main(argv) == 0, (line, capfd.readouterr().err)
        assert capfd.readouterr().out, line
