"""How the package puts Metal's sources together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulator.metal import runner
from metal_selftest import needs_compiler

from isqtorch.ops.metal import source as package_source

pytestmark = needs_compiler


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a package: a kernel, which includes two headers, one of which includes the other."""
    (tmp_path / "metal" / "kernels").mkdir(parents=True)
    (tmp_path / "metal" / "one.h").write_text(
        "#pragma once\nstruct one {\n  static float get(device const float* x) { return x[0]; }\n};\n"
    )
    (tmp_path / "metal" / "all.h").write_text('#pragma once\n#include "metal/one.h"\n')
    (tmp_path / "metal" / "kernels" / "copy.metal").write_text(
        """#include <metal_stdlib>
#include "metal/one.h"
#include "metal/all.h"
using namespace metal;
template <typename F, typename T>
kernel void copy(device const float* x [[buffer(0)]], device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[i] = T(F::get(x + i));
}
"""
    )
    monkeypatch.setattr(package_source, "folder", lambda: tmp_path)
    return tmp_path


def copy_source(real: str) -> str:
    return package_source.assemble("metal/kernels/copy.metal", "metal/all.h", {f"copy_{real}": f"copy<one, {real}>"})


def test_a_source_has_each_header_once(folder: Path) -> None:
    source = copy_source("half")
    assert source.count("struct one") == 1 and "metal/one.h" in source and "#pragma once" not in source
    y = torch.empty(4, dtype=torch.float16)
    runner.compile_shader(source).copy_half(torch.arange(4.0), y, threads=4, group_size=4)
    assert y.tolist() == [0, 1, 2, 3]


def test_errors_name_the_line_of_the_file(folder: Path) -> None:
    header = folder / "metal" / "one.h"
    library = runner.compile_shader(copy_source("float"))
    with pytest.raises(runner.MetalError, match=r"byte 16 of 'argument 0' \(16 bytes\) at csrc/metal/one.h:3: "):
        library.copy_float(torch.zeros(4), torch.zeros(8), threads=8, group_size=8)
    header.write_text(header.read_text().replace("device ", ""))
    with pytest.raises(SyntaxError, match=r"csrc/metal/one.h:3: a pointer"):
        runner.compile_shader(copy_source("bfloat"))
    (folder / "metal" / "all.h").unlink()
    with pytest.raises(FileNotFoundError, match=r"all.h"):
        copy_source("float")
