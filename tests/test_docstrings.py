"""Every public docstring is complete: what each argument is, what comes back, what is raised, and an example that parses."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import isqtorch

SECTIONS = r"Args|Returns|Yields|Raises|Attributes|Example"


def section(text: str, name: str) -> str:
    """The lines of one section of a docstring in Google style."""
    found = re.search(rf"^{name}:\n(.*?)(?=^(?:{SECTIONS}):$|\Z)", text, re.M | re.S)
    return textwrap.dedent(found[1]) if found else ""


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in isqtorch.__all__:
        value = getattr(isqtorch, name, None)
        if inspect.isfunction(value):
            yield name, value
    for name in ("save", "load_"):
        yield f"checkpoint.{name}", getattr(isqtorch.checkpoint, name)
    yield "metal.check", isqtorch.metal.check


def public_classes() -> list[type]:
    values = (getattr(isqtorch, name, None) for name in isqtorch.__all__)
    return [value for value in values if inspect.isclass(value)]


FUNCTIONS = dict(public_functions())
METHODS = {
    f"{cls.__name__}.{name}": getattr(cls, name)
    for cls in public_classes()
    for name, member in vars(cls).items()
    if not name.startswith("_")
    and inspect.isroutine(getattr(cls, name))
    and isinstance(member, (type(lambda: 0), classmethod))
}
INHERITED = (
    "forward",
    "extra_repr",
    "to_dict",
)  # nn.Module's, and what transformers asks for, mean what they mean there


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"^([\w, *]+):", section(text, "Args"), re.M))))
    assert set(signature.parameters) <= documented, f"{name}: {sorted(set(signature.parameters) - documented)}"
    if str(signature.return_annotation) != "None":
        assert section(text, "Returns") or section(text, "Yields"), name
    assert section(text, "Raises") or not signature.parameters, name
    compile(section(text, "Example"), name, "exec")
    assert "isqtorch." in section(text, "Example"), name


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_classes(cls: type) -> None:
    text = inspect.getdoc(cls) or ""
    assert len(text.split()) >= 5
    compile(section(text, "Example"), cls.__name__, "exec")
    assert "isqtorch." in section(text, "Example"), cls.__name__


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    """Methods say at least what they do; their arguments are documented where there are any to explain."""
    if name.rpartition(".")[2] in INHERITED:
        return
    text = inspect.getdoc(METHODS[name]) or ""
    assert len(text.split()) >= 3, name
    parameters = [p for p in inspect.signature(METHODS[name]).parameters if p not in ("self", "cls")]
    mentioned = [p for p in parameters if re.search(rf"\b{p}\b", text)]
    assert len(parameters) <= 1 or mentioned == parameters, f"{name}: {sorted(set(parameters) - set(mentioned))}"


def test_the_check_finds_a_missing_argument() -> None:
    text = "Do it.\n\nArgs:\n    model, fmt: see there.\n    rule: one of two.\n\nReturns:\n    It."
    assert section(text, "Args") == "model, fmt: see there.\nrule: one of two.\n\n"
    assert section(text, "Raises") == ""
