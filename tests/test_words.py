"""What people who come from other libraries type: the error says what it is called here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp
from torch import nn

import isqtorch
from isqtorch.cli import main
from isqtorch.formats import get_format, mix_name, resolve_format
from isqtorch.formats.words import _WORDS
from isqtorch.policy.words import _OPTIONS


def message(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


# ---- formats ---------------------------------------------------------------------------------------------------------

MEANT = {
    "Did you mean 4, the best format of that many bits?": (
        "int4 INT4 4bit 4-bit 4bits 4_bit w4a16 int4wo int4_weight_only uint4 u4 i4 q4 load_in_4bit 4bpw int4_sym"
    ).split(),
    "Did you mean 8, the best format of that many bits?": "int8 8bit q8 torch.int8 7bit".split(),
    "Did you mean 2, the best format of that many bits?": ["int2", "1bit", "1-bit"],
    "Did you mean 'q4k_m'?": ["Q4_K_L", "q4k_xl", "Q4_K_XL"],
    "Did you mean 'q4_k'?": ["q4-k", "q4_kk"],
    "Did you mean 'q4_k_m'?": ["q4-k-m", "q4_k_mm"],
    'the nearest here is "q4k"': ["nf4", "NF4", "bnb_nf4", "fp4"],
    "the nearest here is 4 with calibration_file=": ["awq", "gptq", "awq-4bit", "gptq_int4", "int4_awq", "auto-round"],
    "the nearest here is 2 with imatrix=": ["iq1_m", "iq2_xs", "IQ2_XXS", "tq1_0"],
    "the nearest here is 3 with imatrix=": ["iq3_s"],
    'the nearest here is "fp8"': ["e4m3", "fp8_e5m2", "float8", "mxfp8"],
    "give no format to leave weights as they are": ["bf16", "float16", "torch.bfloat16", "none"],
    'the nearest here is "afq4"': ["mlx", "afq"],
}


@pytest.mark.parametrize(("hint", "word"), [(hint, word) for hint, words in MEANT.items() for word in words])
def test_names_of_formats(hint: str, word: str) -> None:
    text = message(lambda: isqtorch.quantize_(mlp(), word))
    assert hint in text and len(text) < 250, text
    assert message(lambda: isqtorch.quantize(torch.ones(4, 256), word)) == text
    assert text in message(lambda: isqtorch.quantize_(mlp(), None, topology={"/0/": word}))


@pytest.mark.parametrize("word", ["xyz", "", "q" * 1000, "4" * 50, "ünïcode"])
def test_words_that_nobody_means(word: str) -> None:
    text = message(lambda: isqtorch.quantize_(mlp(), word))
    assert "mean" not in text and "here is" not in text and len(text) < 500


@pytest.mark.parametrize("word", _WORDS)
def test_the_words_are_no_formats_and_what_they_lead_to_is(word: str) -> None:
    with pytest.raises(ValueError):
        get_format(word)
    assert mix_name(word) is None
    for quoted in _WORDS[word][1].split('"')[1::2]:
        assert mix_name(quoted) or resolve_format(quoted)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (4.5, 'For an average of so many bits, give "auto" and target_bpw=4.5'),
        (torch.int8, "got torch.int8"),
        (nn.Linear(2, 2), "got Linear"),
        ([4], "got list"),
    ],
)
def test_what_is_no_name(spec: Any, words: str) -> None:
    assert message(lambda: isqtorch.resolve_format(spec)).endswith(words)


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {
    "bits": "quantize_(model, 4)",
    "load_in_4bit": "of bitsandbytes. Here it is quantize_(model, 4)",
    "load_in_8bit": "of bitsandbytes. Here it is quantize_(model, 8)",
    "quant_type": "quantize_(model, 4)",
    "bnb_4bit_quant_type": "quantize_(model, 4)",
    "w_bit": "quantize_(model, 4)",
    "group_size": "afq4g32",
    "q_group_size": "afq4g32",
    "bnb_4bit_compute_dtype": "the dtype of from_pretrained",
    "dataset": "calibration_file=...",
    "ignore": "exclude=...",
    "llm_int8_skip_modules": "exclude=...",
    "exlude": "Did you mean 'exclude'?",
    "spam": "Options are model, fmt, topology, ",
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str) -> None:
    for call in (lambda: isqtorch.quantize_(mlp(), **{option: 4}), lambda: isqtorch.quantize_(mlp(), 4, **{option: 4})):
        text = message(call)
        assert text.startswith(f"quantize_: unknown option {option!r}") and OPTIONS[option] in text


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (isqtorch.requantize_, "requantize_(model, 3)"),
        (isqtorch.plan, "plan(model, 3)"),
        (isqtorch.load, "load(source, 3)"),
    ],
)
def test_other_functions(function: Callable[..., Any], how: str) -> None:
    assert how in message(lambda: function("x", bits=3))
    assert function.__name__ == how.partition("(")[0]


def test_options_of_the_configuration() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(
        ValueError, match=r"IsqConfig: unknown option 'load_in_4bit', of bitsandbytes. Here it is IsqConfig\(4\)"
    ):
        isqtorch.IsqConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match=r"group_size.*afq4g32"):
        isqtorch.IsqConfig(4, group_size=32)


def test_the_options_are_none_of_ours() -> None:
    ours = isqtorch.quantize_.__wrapped__.__code__.co_varnames  # type: ignore[attr-defined]
    assert not set(_OPTIONS) & set(ours)


def test_warnings_name_the_line_of_the_user() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        isqtorch.quantize_(nn.Sequential(nn.Linear(256, 256).requires_grad_(False).apply(_tiny)), "q6k", progress=False)
    assert [warning.filename for warning in caught] == [__file__]


@torch.no_grad()
def _tiny(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.mul_(1e-6)


# ---- models ----------------------------------------------------------------------------------------------------------


class Pipeline:
    """As those of diffusers and transformers: it holds modules, and is none."""

    def __init__(self) -> None:
        self.encoder, self.body, self._private = nn.Linear(2, 2), mlp(), mlp()
        self.name = "x"


@pytest.mark.parametrize("op", [isqtorch.quantize_, isqtorch.requantize_])
def test_what_holds_modules(op: Callable[..., Any]) -> None:
    text = message(lambda: op(Pipeline(), "q4k"))
    name = op.__name__
    assert text.startswith(f"{name}: model must be an nn.Module, and a Pipeline only holds some: body (Sequential, ")
    assert (
        text.endswith(f"encoder (Linear, 24 B). Give one of them: {name}(pipe.body, 'q4k')") and "_private" not in text
    )


def test_arguments_in_the_wrong_order() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(50)])
    for function in (isqtorch.quantize_, isqtorch.requantize_, isqtorch.plan):
        text = message(lambda function=function: function(4, model))
        assert text == f"{function.__name__}: the model comes first, then the format: {function.__name__}(model, 4)"


def test_a_path_in_the_place_of_a_model() -> None:
    assert "isqtorch.load opens a folder" in message(lambda: isqtorch.quantize_("my-model", 4))


# ---- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("chat -m x", "Here chat is run"),
        ("convert x", "Here convert is export, or quantize"),
        ("run -m x --bits 4", "Here --bits is --isq 4"),
        ("run -m x --load-in-4bit", "Here --load-in-4bit is --isq 4"),
        ("quantize -m x --isq 4 -o y --group-size 32", "Here --group-size is --isq afq4g32"),
        ("export -m x --to gguf -o y --outtype q8_0", "Here --outtype is --to gguf"),
        ("run -m x --spam", "unrecognized arguments: --spam. See"),
    ],
)
def test_the_command_line(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert hint in text and text.count("\n") == 1


def test_a_format_of_another_library_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert main(["quantize", "-m", "x", "-o", "y", "--isq", "nf4"]) == 1
    assert "'nf4' is a data type of bitsandbytes; the nearest here is \"q4k\"" in capsys.readouterr().err


def test_the_bare_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().err
    assert "COMMAND" in text and "quantize a model" in text and "isqtorch run -m FOLDER --isq 4" in text


@pytest.mark.parametrize(
    "line",
    [
        "perplexity M --text T",
        "perplexity -m M --text T",
        "perplexity --text T --model=M --mode llamacpp",
        "imatrix M T -o o.gguf",
        "imatrix M -o o.gguf T",
        "imatrix -m M T -o o.gguf",
        "imatrix T -o o.gguf -m M",
        "imatrix -mM -o o.gguf T",
    ],
)
def test_the_model_is_the_first_argument_or_m(line: str) -> None:
    from isqtorch.cli import build_parser

    parser = build_parser()
    parser.parse_args("imatrix -m other T -o o.gguf".split())  # leaves no trace in the parser
    args = parser.parse_args(line.split())
    assert (args.model, args.text) == ("M", "T")


@pytest.mark.parametrize("line", ["perplexity M -m N --text T", "perplexity --text T", "imatrix -o o.gguf T"])
def test_no_model_or_two(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(line.split())
    assert "arguments" in capsys.readouterr().err
