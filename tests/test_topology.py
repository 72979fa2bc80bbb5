"""Topology: keys, values, precedence, files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from isqtorch.inplace.quantize import quantize_
from isqtorch.policy.topology import MAX_ENTRIES, Topology
from isqtorch.policy.yaml_subset import MAX_FILE_BYTES


def winner(source, name: str) -> str | None:
    entry = Topology.load(source).find(name)
    return None if entry is None else entry.key


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.3.mlp.up_proj", 3),
        ("layers.3", 3),
        ("transformer.h.3.attn.c_attn", 3),
        ("encoder.layer.3.output.dense", 3),
        ("transformer_blocks.3.ff", None),
        ("blocks.3.attn", 3),
        ("block.3.attn", 3),
        ("model.layers.3.experts.layers.7.up", 3),
        ("mylayers.3.up", None),
        ("lm_head", None),
    ],
)
def test_layer_index(name: str, index: int | None) -> None:
    topology = Topology.load(dict.fromkeys(range(10), "q4k"))
    assert winner(topology, name) == (None if index is None else str(index))


def test_the_end_of_a_range_is_exclusive() -> None:
    topology = {"2-4": "q6k"}
    assert [winner(topology, f"layers.{i}.x") for i in range(6)] == [None, None, "2-4", "2-4", None, None]


def test_regex_beats_range_and_later_beats_earlier() -> None:
    assert winner({"/up/": "q4k", "0-9": "q6k"}, "layers.1.up") == "/up/"
    assert winner({"0-9": "q6k", "1": "q8_0"}, "layers.1.up") == "1"
    assert winner({"1": "q8_0", "0-9": "q6k"}, "layers.1.up") == "0-9"
    assert winner({"/up/": "q4k", "/layers/": "q6k"}, "layers.1.up") == "/layers/"


def test_values() -> None:
    entries = Topology.load(
        {0: "q4k", "1": 6, 2: None, "3": {"isq": 8, "device": "cpu"}, 4: {"device": "cuda:1"}, 5: {"isq": None}}
    ).entries
    assert [entry.spec for entry in entries] == ["q4k", 6, None, 8, None, None]
    assert [entry.leave for entry in entries] == [False, False, True, False, False, True]
    assert [entry.device for entry in entries] == [None, None, None, torch.device("cpu"), torch.device("cuda:1"), None]


def test_an_entry_replaces_another_entirely() -> None:
    entry = Topology.load({"0-4": {"isq": "q6k", "device": "cpu"}, "1": "q4k"}).find("layers.1.up")
    assert entry is not None and entry.spec == "q4k" and entry.device is None


def test_yaml(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("0-8: q6k\n12: {isq: q8_0, device: cpu}\n'/lm_head/': null\n'/mlp\\.up/': 4\n13:\n")
    for source in (path, str(path)):
        entries = Topology.load(source).entries
        assert [entry.key for entry in entries] == ["0-8", "12", "/lm_head/", "/mlp\\.up/", "13"]
        assert [entry.leave for entry in entries] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ({"lm_head": "q4k"}, r"unknown key 'lm_head'\. A key is a layer number"),
        ({"-1": "q4k"}, r"unknown key '-1'"),
        ({"1-": "q4k"}, r"unknown key '1-'"),
        ({"//": "q4k"}, r"unknown key '//'"),
        ({True: "q4k"}, r"key True is not a layer number"),
        ({1.5: "q4k"}, r"key 1\.5 is not"),
        ({"5-5": "q4k"}, r"entry '5-5': the end of a range is exclusive"),
        ({"5-3": "q4k"}, r"entry '5-3': the end of a range"),
        ({"99999999999-3": "q4k"}, r"unknown key"),
        ({"/(/": "q4k"}, r"entry '/\(/': bad regex"),
        ({"1": "q9k"}, r"entry '1': unknown format 'q9k'"),
        ({"1": 7}, r"entry '1': no format has 7 bits"),
        ({"1": True}, r"entry '1': format must be a name or a number of bits, got True"),
        ({"1": 4.0}, r"entry '1': format must be"),
        ({"1": ["q4k"]}, r"entry '1': format must be"),
        ({"1": {"isk": "q4k"}}, r"entry '1': unknown subkey 'isk'\. Use isq"),
        ({"1": {}}, r"entry '1': an empty mapping"),
        ({"1": {"isq": "q4k", "device": "gpu9"}}, r"entry '1': device 'gpu9' is not a torch device"),
        ({"1": {"device": None}}, r"entry '1': device None is not"),
        (["q4k"], r"must be a dict or the path of a YAML file, got list"),
    ],
)
def test_bad_entries(topology, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology.load(topology)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: q4k\n1: q6k\n", r"line 2: key '1' is there twice"),
        ("1: {isq: q4k, isq: q6k}\n", r"key 'isq' is there twice"),
        ("1: [\n", r"not valid YAML"),
        ("- q4k\n", r"must be a dict or the path of a YAML file, got list"),
        ("", r"got NoneType"),
        ("1: !!python/object/apply:os.system ['true']\n", r"not valid YAML"),
        ("[" * 5000, r"nested too deeply|not valid YAML|got list"),
        ("? [a, b]\n: q4k\n", r"topology: (key|.*not valid YAML)"),
        ("a: " + "x" * MAX_FILE_BYTES, r"larger than"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Topology.load(path)


def test_not_text_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(ValueError, match="not valid YAML"):
        Topology.load(path)
    with pytest.raises(FileNotFoundError):
        Topology.load(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!timestamp 'x': 1\n",
        "0: !!bool 'abc'\n",
        "0: !!int 'x'\n",
        "!!set {0, 1}\n",
        "0: !!binary 'x'\n",
        "0: &a q4k\n1: *a\n",
        "a: &a [x, *a]\n",
        "&a 0: q4k\n",
        "0: {isq: [q4k]}\n",
        "0: {isq: {isq: q4k}}\n",
        "<<: {0: q4k}\n",
        "2001-01-01: q4k\n",
        "0: 2001-01-01\n",
        "0: q4k\n---\n1: q4k\n",
        "0x10: q4k\n",
        "~: q4k\n",
    ],
)
def test_yaml_that_is_no_topology(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="topology: "):
        Topology.load(path)


@pytest.mark.parametrize(
    ("one", "two"), [("0", "00"), ("0", "'0'"), ("1-3", "01-3"), ("1", "1-2"), ("7", "'007'"), ("1-3", "1-03")]
)
def test_two_entries_for_the_same_layers(tmp_path: Path, one: str, two: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(f"{one}: q4k\n{two}: q6k\n")
    with pytest.raises(ValueError, match=r"are for the same layers|is there twice"):
        Topology.load(path)


def test_two_keys_of_a_dict_for_the_same_layers() -> None:
    for topology in ({0: "q4k", "0": "q6k"}, {"1-3": "q4k", "01-3": "q6k"}, {1: "q4k", "1-2": None}):
        with pytest.raises(ValueError, match=r"entries '.*' and '.*' are for the same layers"):
            Topology.load(topology)


def test_layer_numbers_are_decimal(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("010: q4k\n")  # YAML would read 8
    assert Topology.load(path).find("layers.10.x") is not None and Topology.load(path).find("layers.8.x") is None


@pytest.mark.parametrize("place", ["pipe", "device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, place: str) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "folder": tmp_path}[place]
    if place == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match="not a regular file"):
        Topology.load(path)


def test_too_many_entries(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("".join(f"'/nothing{i}/': q8_0\n" for i in range(40000)))
    with pytest.raises(ValueError, match=f"more than {MAX_ENTRIES} entries. Join entries"):
        Topology.load(path)
    with pytest.raises(ValueError, match=f"the limit is {MAX_ENTRIES}"):
        Topology.load(dict.fromkeys(range(MAX_ENTRIES + 1), "q8_0"))


def test_a_saved_topology_with_a_long_regex_can_be_read(tmp_path: Path) -> None:
    formats = {f"layers.0.experts.{i}.up": "q4k" if i % 2 else "q6k" for i in range(1000)}
    topology = Topology.exact(formats)
    topology.save(tmp_path / "t.yaml")
    again = Topology.load(tmp_path / "t.yaml")
    assert again.entries == topology.entries
    assert all(again.find(path).spec == fmt for path, fmt in formats.items())


def test_entries_that_match_nothing_are_counted() -> None:
    def notes(count: int) -> list[str]:
        topology = {f"/nothing{i}/": "q8_0" for i in range(count)}
        with pytest.warns(UserWarning, match="match"):
            report = quantize_(nn.Sequential(nn.Linear(64, 64)), "q8_0", topology=topology, progress=False)
        return [note for note in report.notes if "no layer" in note]

    assert notes(2) == ["topology entry '/nothing0/' matches no layer", "topology entry '/nothing1/' matches no layer"]
    assert len(notes(300)) == 11 and notes(300)[-1] == "290 more topology entries and patterns match no layer"
