"""Triton's kernels by its interpreter, against plain torch and float64, and their compilation for a GPU."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipelines.core import chunk as plain
from pipelines.core import kernels
from tests.core.kernel_cases import DIVERGENCES, KINDS, Found, Logits, check_terms, logits, oracle, relative
from tests.ranks import RankPools

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

CASES = "tests.core.cases_triton:"
TRITON = f"Triton {importlib.metadata.version('triton')}"
TOKENS, WIDTH = 4, 41  # blocks are of 16 columns here

SETTINGS: dict[str, dict[str, Any]] = {
    "T1": {},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_k_hot": {"top_k": 5, "temperature": 0.7},
    "kd_alone": {"ce_scale": 0.0, "temperature": 2.0},
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPools]:
    """Ranks of their own: whether Triton interprets is settled when it is first imported."""
    pools = RankPools({"TRITON_INTERPRET": "1"})
    yield pools
    pools.close()


def run(interpreted: RankPools, function: str, **arguments: Any) -> Any:
    return interpreted(1, CASES + function, **arguments)[0]


@pytest.mark.parametrize("name, parameter", DIVERGENCES.values(), ids=DIVERGENCES)
def test_pointwise_terms_are_those_of_the_family(interpreted: RankPools, name: str, parameter: float | None) -> None:
    run(interpreted, "check_pointwise", device="cpu", name=name, parameter=parameter)


def test_logarithms_and_exponentials_near_0_are_right_to_the_last_digits(interpreted: RankPools) -> None:
    run(interpreted, "check_functions", device="cpu")


@pytest.mark.parametrize("settings", [s for s in SETTINGS.values() if "ce_scale" not in s], ids=list(SETTINGS)[:-1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "minus_infinity"])
def test_rows_are_those_of_plain_torch(interpreted: RankPools, kind: str, settings: dict[str, Any]) -> None:
    for divergence in (("forward_kl", None), ("reverse_kl", None), ("jensen_shannon", 0.3)):
        given = logits(kind, 2, WIDTH)
        run(interpreted, "check_rows", given=given, divergence=divergence, **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_values_and_gradients(interpreted: RankPools, divergence: tuple[str, float], settings: dict[str, Any]) -> None:
    given = logits("ordinary", TOKENS, WIDTH)
    expected = oracle(given, divergence=divergence, **settings)
    found = run(interpreted, "through", given=given, divergence=divergence, telemetry=True, **settings)
    check_terms(found, expected, bound=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_extreme_logits(interpreted: RankPools, divergence: tuple[str, float], kind: str) -> None:
    given = logits(kind, 3, WIDTH)
    found = run(interpreted, "through", given=given, divergence=divergence, telemetry=True)
    check_terms(found, oracle(given, divergence=divergence), bound=1e-5)


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 32, 100])
def test_widths(interpreted: RankPools, width: int) -> None:
    given = logits("ordinary", 3, width)
    settings: dict[str, Any] = {"divergence": ("jensen_shannon", 0.3), "temperature": 1.3}
    if width > 1:
        settings["top_k"] = width // 2
    found = run(interpreted, "through", given=given, **settings)
    check_terms(found, oracle(given, **settings), bound=2e-6)


@pytest.mark.parametrize("name, parameter", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_equal_models_have_a_divergence_of_0(
    interpreted: RankPools, name: str, parameter: float | None, temperature: float
) -> None:
    for top_k in (None, 3):
        given = logits("equal", 2, WIDTH)
        found = run(
            interpreted,
            "through",
            given=given,
            divergence=(name, parameter),
            temperature=temperature,
            top_k=top_k,
            ce_scale=0.0,
        )
        assert torch.equal(found.kd, torch.zeros(2))
        assert found.gradient.abs().max() < 1e-7
        if name == "forward_kl" and top_k is None:
            assert not found.gradient.any()


def test_cross_entropy_alone(interpreted: RankPools) -> None:
    given = logits("ordinary", TOKENS, WIDTH)
    rows, expected, gradient = run(interpreted, "cross_entropy_alone", given=given)
    torch.testing.assert_close(rows, expected, rtol=2e-6, atol=0)
    assert relative(gradient, oracle(given, kd_scale=0.0, ce_scale=1.0).gradient) < 2e-6


def test_bf16_logits_are_computed_in_fp32(interpreted: RankPools) -> None:
    given = logits("ordinary", TOKENS, WIDTH, torch.bfloat16)
    expected = oracle(given)
    found = run(interpreted, "through", given=given)
    assert found.gradient.dtype == torch.bfloat16
    assert relative(found.gradient, expected.gradient) < 1e-2  # the interpreter cuts where a GPU rounds
    assert relative(found.kd, expected.kd) < 2e-6 and relative(found.ce, expected.ce) < 2e-6


def test_rows_may_be_wider_than_the_logits(interpreted: RankPools) -> None:
    given = logits("ordinary", TOKENS, WIDTH)
    found, beyond = run(interpreted, "strided", given=given, divergence=("skew_kl", None), top_k=4)
    check_terms(found, oracle(given, divergence=("skew_kl", None), top_k=4), bound=2e-6)
    assert not beyond.any()


def test_nan_stays_nan(interpreted: RankPools) -> None:
    for model in (0, 1):
        given = logits("ordinary", 3, WIDTH)
        given[model][1, 20] = torch.nan
        for divergence in DIVERGENCES.values():
            found: Found = run(interpreted, "through", given=given, divergence=divergence)
            assert found.kd.isnan().tolist() == [False, True, False]
            assert found.gradient.isnan().all(1).tolist() == [False, True, False]
            assert found.agreement[1] == 0


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0, "top_k": 4}], ids=["T1", "top_k_hot"])
@pytest.mark.parametrize("divergence", [("forward_kl", None), ("reverse_kl", None), ("skew_kl", 0.3)], ids=str)
@pytest.mark.parametrize("starts, vocab_size", [([0, 11], 41), ([0, 20], 33), ([0, 30], 29)], ids=str)
def test_shards(
    interpreted: RankPools,
    starts: list[int],
    vocab_size: int,
    divergence: tuple[str, float | None],
    settings: dict[str, Any],
) -> None:
    given = logits("ordinary", TOKENS, WIDTH)
    given = given._replace(labels=given.labels.clamp(max=vocab_size - 1))
    settings = settings | {"divergence": divergence, "kd_scale": 0.7, "ce_scale": 0.3}
    valid = Logits(given.student[:, :vocab_size], given.teacher[:, :vocab_size], given.labels)
    expected = oracle(valid, **settings)
    found = interpreted(2, CASES + "sharded", given=given, starts=starts, vocab_size=vocab_size, **settings)
    for result in found:
        assert relative(result["kd"], expected.kd) < 2e-6 and relative(result["ce"], expected.ce) < 2e-6
    gradient = torch.cat([result["gradient"] for result in found], dim=1)
    assert relative(gradient[:, :vocab_size], expected.gradient) < 2e-6
    assert not gradient[:, vocab_size:].any()


@pytest.mark.parametrize("width, tokens", [(0, 4), (9, 0), (0, 0)])
def test_nothing_is_started_for_no_column_or_no_token(interpreted: RankPools, width: int, tokens: int) -> None:
    statistics, sums, *expected = run(interpreted, "nothing", width=width, tokens=tokens)
    torch.testing.assert_close([statistics, sums], expected, rtol=0, atol=0)


def test_the_fused_linear_divergence_takes_them(interpreted: RankPools) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [(TOKENS, 8), (TOKENS, 12), (WIDTH, 8), (WIDTH, 12)]
    *hidden, student_head, teacher_head = (torch.randn(size, generator=generator) for size in sizes)
    labels = torch.randint(0, WIDTH, (TOKENS,), generator=generator)
    given = {"hidden": hidden, "heads": [student_head, teacher_head], "labels": labels}
    found = run(interpreted, "linear", with_triton=True, **given)
    expected = run(interpreted, "linear", with_triton=False, **given)
    for name in expected:
        assert relative(found[name], expected[name]) < 2e-6, name


def test_the_kernels_of_a_device(interpreted: RankPools, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(interpreted, "in_words") == f"{TRITON}, interpreted"
    monkeypatch.setattr(kernels, "_kernels_for", kernels._kernels_for.__wrapped__)
    assert kernels.kernels_for(torch.device("cpu")) == (plain, "plain torch")
    assert kernels.kernels_for(torch.device("cuda", 1), "torch") == (plain, "plain torch")
    chosen, words = kernels.kernels_for(torch.device("cuda", 1))
    assert getattr(chosen, "__name__", None) == "pipelines.core.triton_kernels" and words == TRITON
    with pytest.raises(ValueError, match="expected a GPU for Triton, found cpu"):
        kernels.kernels_for(torch.device("cpu"), "triton")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    chosen, words = kernels.kernels_for(torch.device("cuda", 1))
    assert chosen is plain and "Triton, which is not installed" in words
    with pytest.raises(ValueError, match="pip install triton"):
        kernels.kernels_for(torch.device("cuda", 1), "triton")


def test_core_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "import pipelines.core.linear_divergence\n"
        "from pipelines.core.kernels import kernels_for\n"
        "assert kernels_for(torch.device('cpu'))[1] == 'plain torch'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
