"""That Triton's kernels compile for an H200, checked without one: what the interpreter accepts the compiler may not."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipelines.core.family import FAMILY

triton = pytest.importorskip("triton", reason="needs Triton, which is not installed")

if triton.knobs.runtime.interpret:
    pytest.skip("needs Triton's compiler, and TRITON_INTERPRET is set", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pipelines.core import triton_kernels  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
NUMBERS = ("tokens", "width", "start", "columns_of_a_part", "student_stride", "teacher_stride", "out_stride")
TAIL = ("threshold", "tail_slope", "tail_log_q")


def compiled(kernel: Any, logits: str, none: tuple[str, ...], flags: dict[str, Any]) -> Any:
    """For rows of 128,256 columns of a dtype ("*fp32"), with arguments in `none` that are None."""
    launch = triton_kernels._launch(128256)
    constants = {"BLOCK": launch["BLOCK"], "STAGES": triton_kernels.STAGES, **flags}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(kernel.arg_names):
        if name in none:
            constants[name] = None
        if name in constants:
            types[name] = "constexpr"
        elif name in NUMBERS:
            types[name] = "i32"
        elif name in ("temperature", "parameter"):
            types[name] = "fp32"
        else:
            columns = {
                "student": logits,
                "teacher": logits,
                "out": "*bf16",
                "label_column": "*i64",
                "label_here": "*i1",
            }
            types[name] = columns.get(name, "*fp32")
        if types[name].startswith("*") or name in ("width", "student_stride", "teacher_stride", "out_stride"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, places, attributes)
    return triton.compile(source, target=HOPPER, options={"num_warps": launch["num_warps"]})


def check(result: Any, path: Path) -> None:
    """Rows are found by 64-bit offsets, -inf is replaced without hiding NaN, and registers suffice."""
    assert "max.NaN.f32" in result.asm["ptx"]
    for name in ("student", "teacher", "out"):
        if re.search(rf"%{name}: ", result.asm["ttir"]):
            assert re.search(rf"tt.addptr %{name}, %\S+ : !tt.ptr<\w+>, i64", result.asm["ttir"]), name
    path.write_bytes(result.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"REG:\d+ STACK:0 .*LOCAL:0", usage), usage


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
@pytest.mark.parametrize(
    "none, flags",
    [
        (("threshold",), {"UNDER": "teacher", "HOT": False, "TELEMETRY": False}),
        (("threshold",), {"UNDER": "student", "HOT": True, "TELEMETRY": True}),
        ((), {"UNDER": None, "HOT": True, "TELEMETRY": False}),
        (("teacher", "threshold"), {"UNDER": None, "HOT": False, "TELEMETRY": False}),
    ],
    ids=["forward", "reverse", "tail", "cross_entropy"],
)
def test_statistics(tmp_path: Path, logits: str, none: tuple[str, ...], flags: dict[str, Any]) -> None:
    check(compiled(triton_kernels._statistics, logits, none, flags), tmp_path / "cubin")


@pytest.mark.parametrize("name", [None, *FAMILY])
def test_sums(tmp_path: Path, name: str | None) -> None:
    none = ("threshold",) if name is None else ()
    flags = {"NAME": name, "HOT": name is not None, "TELEMETRY": True}
    check(compiled(triton_kernels._sums, "*bf16", none, flags), tmp_path / "cubin")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "none, hot",
    [(TAIL, False), ((), True), ((*TAIL, "ce_factor", "label_column", "label_here"), False)],
    ids=["ordinary", "tail_hot", "kd_alone"],
)
def test_gradient(tmp_path: Path, name: str, none: tuple[str, ...], hot: bool) -> None:
    flags = {"NAME": name, "HOT": hot}
    check(compiled(triton_kernels._gradient, "*fp32", none, flags), tmp_path / "cubin")


def test_gradient_of_cross_entropy_alone(tmp_path: Path) -> None:
    kd = ("teacher", "teacher_max", "teacher_log_sum", "slope_sum", "kd_factor", *TAIL)
    flags = {"NAME": "forward_kl", "HOT": False}
    check(compiled(triton_kernels._gradient, "*bf16", kd, flags), tmp_path / "cubin")
