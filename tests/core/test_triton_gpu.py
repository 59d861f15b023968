"""Triton's kernels on a GPU, at Llama 3.1's vocabulary: `pytest -m gpu tests/core/test_triton_gpu.py`."""

import importlib
import itertools
from typing import Any

import pytest
import torch

from pipelines.config import gpu_count
from pipelines.core.kernels import kernels_for
from tests.core.kernel_cases import DIVERGENCES, KINDS, Logits, check_rows, check_terms, logits, oracle, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_count() == 0, reason="needs an NVIDIA GPU, and this machine has none"),
]

TOKENS, VOCABULARY = 6, 128256
SETTINGS: dict[str, dict[str, Any]] = {
    "T1": {},
    "hot": {"temperature": 2.5},
    "top_k_hot": {"top_k": 256, "temperature": 2.0},
}


@pytest.fixture(scope="module")
def cases() -> Any:
    return importlib.import_module("tests.core.cases_triton")


def on_gpu(kind: str, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Logits:
    return logits(kind, tokens, width, dtype, "cuda")


def test_a_gpu_takes_triton(cases: Any) -> None:
    kernels, words = kernels_for(torch.device("cuda"))
    assert kernels is cases.KERNELS and words.startswith("Triton 3.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_values_and_gradients(cases: Any, divergence: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    given = on_gpu("ordinary", TOKENS, VOCABULARY, dtype)
    found = cases.through(given, divergence=divergence, telemetry=True, **settings)
    expected = oracle(given, divergence=divergence, **settings)
    check_terms(found._replace(gradient=expected.gradient), expected, bound=1e-5)
    assert found.gradient.dtype == dtype
    assert relative(found.gradient, expected.gradient) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_extreme_logits(cases: Any, divergence: Any, kind: str) -> None:
    given = on_gpu(kind, TOKENS, VOCABULARY)
    found = cases.through(given, divergence=divergence, telemetry=True)
    check_terms(found, oracle(given, divergence=divergence), bound=1e-5)


@pytest.mark.parametrize("width", [1, 17, 1000, 2049, 4099, 16032, 64128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths(cases: Any, width: int, dtype: torch.dtype) -> None:
    for settings in ({}, {"temperature": 1.3, "top_k": max(1, width // 2)} if width > 1 else {}):
        check_rows(cases.KERNELS, on_gpu("ordinary", 5, width, dtype), divergence=("jensen_shannon", 0.3), **settings)
        check_rows(cases.KERNELS, on_gpu("ties", 5, width, dtype), divergence=("reverse_kl", None), **settings)
    given = on_gpu("ordinary", 3, width)
    check_terms(cases.through(given), oracle(given), bound=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_models_have_a_divergence_of_0(cases: Any, divergence: Any, dtype: torch.dtype) -> None:
    for temperature in (1.0, 1.7):
        given = on_gpu("equal", TOKENS, VOCABULARY, dtype)
        found = cases.through(given, divergence=divergence, temperature=temperature, ce_scale=0.0)
        assert not found.kd.any() and found.gradient.abs().max() < 1e-7


def test_nan_stays_nan(cases: Any) -> None:
    for model, divergence in itertools.product((0, 1), DIVERGENCES.values()):
        given = on_gpu("ordinary", 3, VOCABULARY)
        given[model][1, 70000] = torch.nan
        found = cases.through(given, divergence=divergence)
        assert found.kd.isnan().tolist() == [False, True, False] and found.agreement[1] == 0
        assert found.gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_pointwise_terms_are_right(cases: Any, divergence: Any) -> None:
    cases.check_pointwise("cuda", *divergence)
    cases.check_functions("cuda")


def test_rows_beyond_two_to_the_31_elements(cases: Any) -> None:
    stride = (1 << 31) + 64
    whole = [torch.empty(stride + 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    given = on_gpu("ordinary", 2, 4096, torch.bfloat16)
    far = Logits(*(x.as_strided((2, 4096), (stride, 1)) for x in whole), given.labels)
    far.student.copy_(given.student), far.teacher.copy_(given.teacher)
    near = cases.through(given)
    found = importlib.import_module("tests.core.kernel_cases").through(cases.KERNELS, far)
    for name in ("kd", "ce", "gradient"):
        assert torch.equal(getattr(found, name), getattr(near, name)), name


def test_nothing_waits_for_the_host_and_nothing_of_the_logits_size_is_kept(cases: Any) -> None:
    given = on_gpu("ordinary", 64, VOCABULARY, torch.bfloat16)
    settings = {"divergence": ("jensen_shannon", None), "telemetry": True, "temperature": 2.0}
    cases.through(given, **settings)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        importlib.import_module("tests.core.kernel_cases").through(cases.KERNELS, given, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < given.student.numel() * 2 / 50


def test_the_fused_linear_divergence_takes_them(cases: Any) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    sizes = [(96, 64), (96, 128), (VOCABULARY, 64), (VOCABULARY, 128)]
    *hidden, student_head, teacher_head = (torch.randn(s, generator=generator, device="cuda") / 8 for s in sizes)
    labels = torch.randint(0, VOCABULARY, (96,), generator=generator, device="cuda")
    given = {"hidden": hidden, "heads": [student_head, teacher_head], "labels": labels}
    found, expected = (cases.linear(with_triton=with_triton, **given) for with_triton in (True, False))
    for name in expected:
        assert relative(found[name], expected[name]) < 1e-5, name
