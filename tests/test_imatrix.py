"""Importance matrix files: the values of llama.cpp's own files, names of layers, and files made to do harm."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden
from torch import nn

import isqtorch
from isqtorch.formats import formats, get_format
from isqtorch.gguf_names import gguf_names, names_to_write
from isqtorch.imatrix import Imatrix, read_imatrix

GOLDEN = Path(__file__).parent / "golden"
LEGACY = (GOLDEN / "ggml_legacy.imatrix").read_bytes()
GGUF = (GOLDEN / "ggml_imatrix.gguf").read_bytes()
EXPECTED = json.loads((GOLDEN / "ggml_expected.json").read_text())


def floats(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)


def cimatrix(entries: dict[str, list[float]]) -> bytes:
    out = struct.pack("<Q", len(entries))
    for name, values in entries.items():
        raw = name.encode()
        out += struct.pack("<Q", len(raw)) + raw + struct.pack(f"<Q{len(values)}f", len(values), *values)
    return out


def legacy(entries: list[tuple[bytes, int, list[float]]], trailer: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return out + trailer


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


META = {
    "general.type": (8, gguf_string("imatrix")),
    "imatrix.datasets": (9, struct.pack("<IQ", 8, 1) + gguf_string("a.txt")),
    "imatrix.chunk_count": (4, struct.pack("<I", 2)),
    "imatrix.chunk_size": (4, struct.pack("<I", 8)),
}


def gguf(
    tensors: list[tuple[str, list[int], list[float]]],
    meta: dict[str, tuple[int, bytes]] = META,
    version: int = 3,
    offsets: dict[str, int] | None = None,
    types: dict[str, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file with tensors (name, dims, values) at multiples of the alignment, or at the given offsets."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    for key, (kind, value) in meta.items():
        out += gguf_string(key) + struct.pack("<I", kind) + value
    data = b""
    for name, dims, values in tensors:
        offset = (offsets or {}).get(name, len(data))
        out += gguf_string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", (types or {}).get(name, 0), offset)
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % alignment)
    return out + bytes(-len(out) % alignment) + data


PAIR = [("x.in_sum2", [4], [1.0, 2.0, 3.0, 4.0]), ("x.counts", [1], [2.0])]

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes) -> Path:
        path = tmp_path / "file"  # no extension: the content must tell
        path.write_bytes(data)
        return path

    return write


# ---- golden files ----------------------------------------------------------------------------------------------------


def test_golden_gguf() -> None:
    imatrix = read_imatrix(GOLDEN / "ggml_imatrix.gguf")
    assert imatrix.format == "gguf"
    assert (imatrix.chunk_size, imatrix.chunk_count) == (EXPECTED["chunk_size"], EXPECTED["chunk_count"])
    assert list(imatrix.datasets) == EXPECTED["datasets"]
    assert sorted(imatrix) == sorted(EXPECTED["gguf"])
    for name, want in EXPECTED["gguf"].items():
        assert imatrix[name].dtype == torch.float32
        assert imatrix[name].shape == (
            (want["n_mat"], want["n_per_row"]) if want["n_mat"] > 1 else (want["n_per_row"],)
        )
        assert torch.equal(imatrix[name].flatten(), floats(want["weights"]))
        assert torch.equal(imatrix.sums[name].flatten(), floats(want["in_sum2"]))
        assert imatrix.counts[name].tolist() == want["counts"]


def test_golden_legacy() -> None:
    imatrix = read_imatrix(str(GOLDEN / "ggml_legacy.imatrix"))
    assert imatrix.format == "legacy"
    assert (imatrix.chunk_size, imatrix.chunk_count) == (None, EXPECTED["chunk_count"])
    assert list(imatrix.datasets) == EXPECTED["datasets"]
    assert sorted(imatrix) == sorted(EXPECTED["legacy"])
    for name, want in EXPECTED["legacy"].items():
        assert torch.equal(imatrix[name], floats(want["weights"]))
        assert torch.equal(imatrix.sums[name], floats(want["stored"]))
        assert imatrix.counts[name].tolist() == [want["ncall"]]


def test_golden_experts_agree() -> None:
    """The legacy file has experts one after another; asked for 4, both files give the same rows."""
    new, old = read_imatrix(GOLDEN / "ggml_imatrix.gguf"), read_imatrix(GOLDEN / "ggml_legacy.imatrix")
    name = "blk.1.ffn_down_exps.weight"
    for imatrix in (new, old):
        stack = imatrix.vector("model.layers.1.mlp.experts.down_proj", 64, experts=4)
        assert stack.shape == (4, 64)
        torch.testing.assert_close(stack.flatten(), floats(EXPECTED["gguf"][name]["weights"]), rtol=1e-6, atol=0)
        assert (stack[1] == 1).all()  # the expert that saw no token
        assert torch.equal(imatrix.vector("model.layers.1.mlp.experts.2.down_proj", 64), stack[2])


# ---- the two formats without a magic ---------------------------------------------------------------------------------


def test_cimatrix(write: Write) -> None:
    imatrix = read_imatrix(write(cimatrix({"model.layers.0.mlp.up_proj": [1.0, 2.0], "x": [0.5]})))
    assert imatrix.format == "cimatrix"
    assert {name: values.tolist() for name, values in imatrix.items()} == {
        "model.layers.0.mlp.up_proj": [1.0, 2.0],
        "x": [0.5],
    }


def test_cimatrix_experts_without_data(write: Write) -> None:
    imatrix = read_imatrix(write(cimatrix({"mlp.experts.up_proj": [1.0, 2.0, 0.0, 0.0, 0.0, 3.0]})))
    assert imatrix.vector("mlp.experts.up_proj", 2, experts=3).tolist() == [[1.0, 2.0], [1.0, 1.0], [0.0, 3.0]]


def test_legacy_without_trailer_and_without_calls(write: Write) -> None:
    imatrix = read_imatrix(write(legacy([(b"a", 4, [2.0, 8.0]), (b"b", 0, [3.0])])))
    assert imatrix["a"].tolist() == [0.5, 2.0]
    assert imatrix["b"].tolist() == [3.0]
    assert (imatrix.chunk_count, imatrix.datasets) == (None, ())


def test_gguf_version_2_and_foreign_tensors(write: Write) -> None:
    tensors = [*PAIR, ("x.in_sum", [4], [0.0] * 4)]  # written by newer llama.cpp
    imatrix = read_imatrix(write(gguf(tensors, version=2, types={"x.in_sum": 77})))
    assert imatrix["x"].tolist() == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_gguf_alignment(write: Write, alignment: int) -> None:
    meta = {**META, "general.alignment": (4, struct.pack("<I", alignment))}
    imatrix = read_imatrix(write(gguf(PAIR, meta, alignment=alignment)))
    assert imatrix["x"].tolist() == [0.5, 1.0, 1.5, 2.0]


# ---- lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("model.layers.7.self_attn.q_proj", "attn_q attn_qkv"),
        ("model.layers.7.self_attn.qkv_proj", "attn_qkv attn_q attn_k attn_v"),
        ("model.language_model.layers.7.self_attn.o_proj", "attn_output"),
        ("model.layers.7.self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        ("model.layers.7.mlp.gate_proj", "ffn_gate ffn_up"),
        ("layers.7.mlp.down_proj", "ffn_down"),
        ("base_model.model.model.layers.7.mlp.up_proj", "ffn_up ffn_gate"),
        ("model.layers.7.mlp.experts.gate_up_proj", "ffn_gate_up_exps ffn_gate_exps ffn_up_exps"),
        ("model.layers.7.block_sparse_moe.experts.3.w2", "ffn_down_exps"),
        ("model.layers.7.mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ("model.layers.7.linear_attn.in_proj_qkvz", "ssm_in"),
        ("backbone.layers.7.mixer.out_proj", "ssm_out"),
        ("backbone.layers.7.mixer.o_proj", "attn_output"),
        ("transformer.h.7.attn.c_attn", "attn_qkv attn_q attn_k attn_v"),
        ("transformer.h.7.attn.c_proj", "attn_output"),
        ("transformer.h.7.mlp.c_proj", "ffn_down"),
        ("bert.encoder.layer.7.attention.self.query", "attn_q attn_qkv"),
        ("bert.encoder.layer.7.attention.output.dense", "attn_output"),
        ("bert.encoder.layer.7.intermediate.dense", "ffn_up"),
        ("bert.encoder.layer.7.output.dense", "ffn_down"),
        ("gpt_neox.layers.7.attention.query_key_value", "attn_qkv attn_q attn_k attn_v"),
        ("model.decoder.layers.7.fc1", "ffn_up"),
        # No names: another tower, another kind of layer, columns in another order.
        ("model.visual.layers.7.mlp.up_proj", ""),
        ("model.vision_tower.layers.7.self_attn.q_proj", ""),
        ("model.layers.7.mlp.chunk_experts.up_proj", ""),
        ("model.layers.7.mlp.experts.odd_proj", ""),
        ("model.layers.7.linear_attn.out_proj", ""),
        ("0", ""),
        ("", ""),
    ],
)
def test_gguf_names(layer: str, names: str) -> None:
    assert gguf_names(layer)[0] == [f"blk.7.{stem}.weight" for stem in names.split()]
    assert gguf_names(f"{layer}.weight") == gguf_names(layer)


def test_gguf_names_of_embedding_head_and_experts() -> None:
    assert gguf_names("model.embed_tokens") == (["token_embd.weight"], None)
    assert gguf_names("transformer.wte") == (["token_embd.weight"], None)
    assert gguf_names("lm_head") == (["output.weight", "token_embd.weight"], None)
    assert gguf_names("model.layers.0.mlp.experts.12.up_proj")[1] == 12


def test_lookup_order() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    entries = {"blk.0.attn_qkv.weight": [1.0], "blk.0.attn_q.weight": [2.0], f"{layer}.weight": [3.0], layer: [4.0]}
    while entries:
        assert Imatrix(entries).vector(layer, 1).item() == len(entries)
        entries.popitem()
    assert Imatrix({"other": [1.0]}).vector(layer, 1) is None


def test_wrong_length_is_named() -> None:
    imatrix = Imatrix({"blk.0.attn_q.weight": torch.ones(64), "stack": torch.ones(4, 8)}, source="m.imatrix")
    with pytest.raises(
        ValueError, match=r"m.imatrix: layer 'model.layers.0.self_attn.q_proj' needs 96 .*attn_q.weight' has 64"
    ):
        imatrix.vector("model.layers.0.self_attn.q_proj", 96)
    with pytest.raises(ValueError, match="needs 8 x 4 importance values, entry 'stack' has 4 x 8"):
        imatrix.vector("stack", 4, experts=8)
    with pytest.raises(ValueError, match="needs 32 importance values"):
        imatrix.vector("stack", 32)
    assert imatrix.vector("stack", 8, experts=4).shape == (4, 8)


@pytest.mark.parametrize("in_features", [0, 63, 64 * 3])
def test_wrong_length_of_one_expert(in_features: int) -> None:
    imatrix = read_imatrix(GOLDEN / "ggml_imatrix.gguf")
    with pytest.raises(ValueError, match=f"needs {in_features} importance"):
        imatrix.vector("model.layers.1.mlp.experts.2.down_proj", in_features)
    with pytest.raises(ValueError, match="needs 64 importance"):
        imatrix.vector("model.layers.1.mlp.experts.4.down_proj", 64)  # there are four


def test_from_a_dict() -> None:
    imatrix = Imatrix({"a": torch.tensor([1, 2], dtype=torch.bfloat16), "b": np.ones((2, 3)), "c": [0.0, 1.0]})
    assert len(imatrix) == 3 and list(imatrix) == ["a", "b", "c"]
    assert all(values.dtype == torch.float32 for values in imatrix.values())
    assert imatrix["c"].tolist() == [0.0, 1.0]  # zeros are data, not missing data


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": [1.0, float("nan")]}, "entry 'a': value 1 is nan"),
        ({"a": [1.0, float("inf")]}, "value 1 is inf"),
        ({"a": [[1.0], [-0.5]]}, "value 1 is -0.5"),
        ({"a": []}, r"shape \[0\]"),
        ({"a": 1.0}, r"shape \[\]"),
        ({"a": torch.ones(1, 1, 1)}, r"shape \[1, 1, 1\]"),
        ({"a": "text"}, "not a tensor of numbers"),
        ({"": [1.0]}, "name of an entry"),
        ({1: [1.0]}, "name of an entry"),
        ({"a" * 1025: [1.0]}, "name of an entry"),
    ],
)
def test_bad_dict(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imatrix(entries)


def test_counts_must_fit() -> None:
    with pytest.raises(ValueError, match=r"counts have shape \[3\], must be \[2\]"):
        Imatrix({"a": torch.ones(2, 4)}, {"a": torch.ones(3)})


# ---- the names of families --------------------------------------------------------------------------------------------

FAMILIES = json.loads((GOLDEN / "gguf_names.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_gguf_package(family: str) -> None:
    """The first name is what the gguf package's table says, for every layer that is ever quantized."""
    for layer, want in FAMILIES[family].items():
        if "ffn_gate_inp" in want:  # routers stay as they are
            continue
        if layer.endswith("linear_attn.out_proj"):  # its columns may be in another order, see gguf_names.py
            assert gguf_names(layer)[0] == []
        else:
            assert gguf_names(layer)[0][:1] == [want], layer
            assert names_to_write(layer)[0][0] == want


def test_names_to_write() -> None:
    fused = "model.layers.3.mlp.experts.gate_up_proj"
    assert names_to_write(fused)[0] == [f"blk.3.ffn_{x}_exps.weight" for x in ("gate_up", "gate", "up")]
    assert names_to_write("model.layers.3.mlp.experts.5.up_proj") == (["blk.3.ffn_up_exps.weight"], 5)
    assert names_to_write("model.layers.3.mlp.gate_proj") == (["blk.3.ffn_gate.weight"], None)
    assert names_to_write("blk.3.attn_q.weight") == ([], None)  # is one already


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [("imatrix.gguf", "imatrix.gguf"), ("legacy.imatrix",) * 2, ("imatrix.gguf", "legacy.imatrix")],
)
def test_written_as_llama_cpp_writes(source: str, target: str, tmp_path: Path) -> None:
    """Byte for byte; the second golden file is what llama.cpp makes of the content of the first."""
    path = tmp_path / target
    read_imatrix(GOLDEN / f"ggml_{source}").save(path)
    assert path.read_bytes() == (GOLDEN / f"ggml_{target}").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [target]  # no temporary file stays


def same_weights(a: Imatrix, b: Imatrix) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[name].flatten(), b[name].flatten()) for name in a)


@pytest.mark.parametrize("source", ["imatrix.gguf", "legacy.imatrix"])
@pytest.mark.parametrize("through", [".gguf", ".imatrix", ".dat", ".cimatrix"])
def test_round_trips_keep_what_the_format_holds(source: str, through: str, tmp_path: Path) -> None:
    original = read_imatrix(GOLDEN / f"ggml_{source}")
    original.save(first := tmp_path / f"a{through}")
    copy = read_imatrix(first)
    if through == ".gguf":
        assert same_weights(copy, original) and copy.datasets == original.datasets
        for name in original:
            assert torch.equal(copy.counts[name], original.counts[name])
            assert torch.equal(copy.sums[name], original.sums[name])
    elif through == ".cimatrix":  # keeps the weights; zeros for an expert without data
        for name in original:
            stored, want = copy[name], original[name].flatten()
            seen = (original.counts[name] > 0).repeat_interleave(want.numel() // original.counts[name].numel())
            assert torch.equal(stored[seen], want[seen]) and not stored[~seen].any()
    else:  # scaled by the number of chunks and back: rounded once where that is no power of two
        for name in original:
            torch.testing.assert_close(copy[name].flatten(), original[name].flatten(), rtol=2e-7, atol=0)
        assert copy.chunk_count == original.chunk_count and copy.datasets == original.datasets[-1:]
    copy.save(second := tmp_path / f"b{through}")
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("kind", [".gguf", ".imatrix", ".cimatrix"])
@pytest.mark.parametrize("start", [".gguf", ".imatrix", ".cimatrix"])
def test_weights_survive_every_pair_of_formats(start: str, kind: str, tmp_path: Path) -> None:
    matrix = Imatrix({"blk.0.attn_q.weight": torch.rand(7), "other.layer": torch.rand(3), "é": [0.0, 1e-30]})
    matrix.save(tmp_path / f"a{start}")
    one = read_imatrix(tmp_path / f"a{start}")
    one.save(tmp_path / f"b{kind}")
    two = read_imatrix(tmp_path / f"b{kind}")
    assert same_weights(matrix, one) and same_weights(one, two)


def test_layers_get_gguf_names(tmp_path: Path) -> None:
    stack, single = torch.rand(2, 8), torch.rand(8)
    path = "model.layers.0.mlp.experts"
    matrix = Imatrix(
        {
            f"{path}.gate_up_proj": stack,
            "model.layers.0.self_attn.q_proj": single,
            "lm_head": single,
            "model.visual.blocks.0.attn.proj": single,  # another tower
            "model.encoder.layers.0.fc1": single,  # two layers, one GGUF name: both keep theirs
            "model.decoder.layers.0.fc1": 2 * single,
        },
        {f"{path}.gate_up_proj": torch.tensor([4, 0])},
    )
    matrix.save(tmp_path / "x.gguf")
    again = read_imatrix(tmp_path / "x.gguf")
    assert sorted(again) == [
        "blk.0.attn_q.weight",
        *(f"blk.0.ffn_{x}_exps.weight" for x in ("gate", "gate_up", "up")),
        "model.decoder.layers.0.fc1",
        "model.encoder.layers.0.fc1",
        "model.visual.blocks.0.attn.proj",
        "output.weight",
    ]
    for layer in matrix:
        if "experts" not in layer:
            assert torch.equal(again.vector(layer, 8), matrix[layer])
    assert again.vector(f"{path}.gate_up_proj", 8, experts=2)[1].tolist() == [1.0] * 8
    assert again.unseen["blk.0.ffn_up_exps.weight"] == 1


def test_saving_what_cannot_be_saved(tmp_path: Path) -> None:
    matrix = Imatrix({"a": [1.0]})
    with pytest.raises(ValueError, match=r"x.txt: the name of an importance matrix must end in .gguf, .imatrix"):
        matrix.save(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError):
        matrix.save(tmp_path / "nowhere" / "x.gguf")
    with pytest.raises(ValueError, match="nothing to save"):
        Imatrix({}).save(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"old")
    with pytest.raises(ValueError, match="more than 63 bytes: llama.cpp could not read"):
        Imatrix({"n" * 60: [1.0]}).save(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


# ---- the goldens through the public door -----------------------------------------------------------------------------

WEIGHTED = [name for name in formats() if get_format(name).takes_importance]


@pytest.mark.parametrize("suffix", [".gguf", ".imatrix", ".cimatrix"])
@pytest.mark.parametrize("variant", ["pos", "zeros"])
@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.filterwarnings("ignore:importance of")
def test_golden_bytes_with_importance_from_a_file(kind: str, variant: str, suffix: str, tmp_path: Path) -> None:
    """A model with a layer per case, quantized with the importance of all of them in one file."""
    data = golden("ggml_public")
    ggml = kind[:-1] + "_K" if kind.endswith("k") else kind
    cases = [key.split("/")[2] for key in data if key.startswith(f"q/{ggml}/") and key.endswith(f"/{variant}")]
    assert len(cases) > 10
    model = nn.Module()
    for case in cases:
        rows, columns = data[f"x/{case}"].shape
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(data[f"x/{case}"].clone())
        model.add_module(case, layer)
    Imatrix({case: data[f"imx/{case}/{variant}"] for case in cases}).save(tmp_path / f"x{suffix}")
    isqtorch.quantize_(model, kind, imatrix=tmp_path / f"x{suffix}", fallback="error")
    wrong = [
        case for case in cases if not torch.equal(model.get_submodule(case).weight, data[f"q/{ggml}/{case}/{variant}"])
    ]
    assert not wrong


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_missing_file_and_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_imatrix(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a regular file"):
        read_imatrix(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_imatrix(tmp_path / "pipe")


def moved(name: str, offset: int) -> bytes:
    return gguf(PAIR, offsets={name: offset})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "number of entries needs 4 bytes, 0 are left"),
        (b"\x01", "needs 4 bytes"),
        (b"# a text file, not a matrix\n", "number of entries is .*legacy"),
        (bytes(8), "number of entries is 0.*cimatrix"),
        (struct.pack("<Q", 1 << 31) + bytes(100), "but only 100 bytes are left"),
        (cimatrix({"a": [1.0]}) + b"x", "1 bytes follow the last entry"),
        (cimatrix({"a": [1.0, -1.0]}), "entry 'a': value 1 is -1"),
        (
            struct.pack("<Q", 1) + gguf_string("a") + struct.pack("<Q", 1 << 62) + bytes(8),
            "number of values of entry 'a'",
        ),
        (
            struct.pack("<Q", 2) + 2 * (gguf_string("a") + struct.pack("<Qf", 1, 1.0)),
            "byte 29: entry 'a' appears twice",
        ),
        (struct.pack("<QQ", 1, 2000) + b"a" * 3000, "length of the name of entry 0 is 2000, the limit is 1024"),
        (legacy([(b"\xff\xfe", 1, [1.0])]), "name of entry 0 is not UTF-8"),
        (legacy([(b"a\x00b", 1, [1.0])]), "unprintable"),
        (legacy([(b"a", -1, [1.0])]), "calls of 'a' is -1"),
        (legacy([(b"a", 1, [])]), "is 0, must be 1 or more|but only"),
        (legacy([(b"a", 1, [1.0]), (b"a", 1, [1.0])]), "appears twice"),
        (legacy([(b"a", 1, [float("nan")])]), "value 0 is nan"),
        (legacy([(b"a", 1, [1.0])], b"\x01\x00"), "number of the last chunk needs 4 bytes, 2 are left"),
        (legacy([(b"a", 1, [1.0])], struct.pack("<ii", 3, -5)), "dataset is -5"),
        (legacy([(b"a", 1, [1.0])], struct.pack("<ii", 3, 5) + b"abc"), "dataset is 5, but only 3"),
        (b"GGUF", "version needs 4 bytes"),
        (gguf(PAIR, version=1), "GGUF version 1, only 2 and 3"),
        (gguf(PAIR, version=3 << 24), "big-endian"),
        (gguf(PAIR, {**META, "general.type": (8, gguf_string("model"))}), "'general.type' is 'model'"),
        (gguf(PAIR, {key: META[key] for key in list(META)[:-1]}), "'imatrix.chunk_size' must be"),
        (gguf(PAIR, {**META, "imatrix.chunk_count": (6, struct.pack("<f", 2))}), "'imatrix.chunk_count' must be"),
        (gguf(PAIR, {**META, "imatrix.datasets": (8, gguf_string("a"))}), "'imatrix.datasets' must be"),
        (gguf(PAIR, {**META, "general.alignment": (4, struct.pack("<I", 24))}), "alignment' is 24"),
        (gguf(PAIR, {**META, "general.alignment": (4, struct.pack("<I", 1 << 21))}), "alignment' is 2097152"),
        (gguf(PAIR, {**META, "k": (99, b"")}), "'k' has unknown type 99"),
        (gguf(PAIR, {**META, "k": (9, struct.pack("<IQ", 9, 1))}), "array with elements of type 9"),
        (
            gguf(PAIR, {**META, "k": (9, struct.pack("<IQ", 10, 1 << 60))}),
            "length of metadata 'k' is 1152921504606846976",
        ),
        (gguf(PAIR, {**META, "k": (8, struct.pack("<Q", 1 << 63))}), "length of metadata 'k'"),
        (gguf([]), "there are no entries"),
        (gguf(PAIR[:1]), "tensor 'x.counts' is missing"),
        (gguf(PAIR[1:]), "tensor 'x.in_sum2' is missing"),
        (gguf([*PAIR, PAIR[0]]), "tensor 'x.in_sum2' appears twice"),
        (gguf(PAIR, types={"x.in_sum2": 1}), "has type 1, must be 0"),
        (gguf([("x.in_sum2", [1, 1, 1, 1, 4], [0.0] * 4), PAIR[1]]), "has 5 dims"),
        (gguf([("x.in_sum2", [], [0.0] * 4), PAIR[1]]), "has 0 dims"),
        (gguf([("x.in_sum2", [0], []), PAIR[1]]), "would lie at"),
        (gguf([("x.in_sum2", [1 << 62], []), PAIR[1]]), "would lie at"),
        (gguf([("x.in_sum2", [1 << 32, 1 << 32], []), ("x.counts", [1, 1 << 32], [])]), "would lie at"),
        (gguf([("x.in_sum2", [2, 2], [0.0] * 4), PAIR[1]]), r"\[2, 2\] and 'x.counts' \[1\] must have shapes"),
        (gguf([("x.in_sum2", [2, 2], [0.0] * 4), ("x.counts", [2], [0.0] * 2)]), "must have shapes"),
        (gguf([("x.in_sum2", [1, 1, 4], [0.0] * 4), ("x.counts", [1, 1, 4], [0.0] * 4)]), "must have shapes"),
        (moved("x.in_sum2", 4), "offset 4, must be a multiple of 32"),
        (moved("x.in_sum2", 1 << 63), "would lie at"),
        (moved("x.counts", 0), "overlaps"),
        (gguf([PAIR[0], ("x.counts", [1], [-1.0])]), "count 0 is -1"),
        (gguf([PAIR[0], ("x.counts", [1], [float("nan")])]), "count 0 is nan"),
        (gguf([PAIR[0], ("x.counts", [1], [3e38])]), "count 0 is 3e"),
        (gguf([("x.in_sum2", [1], [float("inf")]), PAIR[1]]), "entry 'x': value 0 is inf"),
        (gguf([(".in_sum2", [1], [1.0]), (".counts", [1], [1.0])]), "name of an entry"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-bytes",
)
def test_damaged(write: Write, data: bytes, message: str) -> None:
    path = write(data)
    with pytest.raises(ValueError, match=message) as error:
        read_imatrix(path)
    assert str(path) in str(error.value)


def test_truncated_anywhere(write: Write) -> None:
    """Shorter files are refused, except where what is cut off is optional or padding."""
    header = 4 + sum(4 + len(name) + 8 + 4 * len(want["stored"]) for name, want in EXPECTED["legacy"].items())
    padding = len(GGUF) - len(GGUF.rstrip(b"\0"))
    for data, accepted in ((LEGACY, {header}), (GGUF, range(len(GGUF) - padding, len(GGUF)))):
        for length in (*range(0, len(data), 5), header, len(data) - padding - 1, len(data) - 1):
            try:
                imatrix = read_imatrix(write(data[:length]))
            except ValueError:
                continue
            assert length in accepted and len(imatrix) == 6, length
