"""The three products of a head against float64, by either library of a CPU."""

import pytest
import torch

from pipelines.core import products

TOKENS, HIDDEN, WIDTH = 37, 24, 150
LIVE = {"all": [slice(0, WIDTH)], "some": [slice(3, 40), slice(77, WIDTH)]}


@pytest.fixture(params=[False, True], ids=["torch.mm", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "in_parts", lambda device: request.param)
    monkeypatch.setattr(products, "_PART_BYTES", 4 * HIDDEN * 32)  # several parts, the last one smaller


def close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    return bool((found.double() - expected).norm() <= bound * expected.norm())


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((TOKENS, HIDDEN), (WIDTH, HIDDEN), (TOKENS, WIDTH))
    hidden, head, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    return hidden.to(dtype), head.to(dtype), gradient


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits(dtype: torch.dtype) -> None:
    hidden, head, _ = drawn(dtype)
    buffer = torch.full((TOKENS, WIDTH), torch.nan)
    products.logits(hidden, head, buffer)
    assert close(buffer, hidden.double() @ head.double().t(), 1e-6)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, live: str) -> None:
    hidden, head, gradient = drawn(dtype)
    alive = torch.zeros(WIDTH, dtype=torch.float64)
    for columns in LIVE[live]:
        alive[columns] = 1
    expected = (gradient * alive) @ head.double()
    found = products.hidden_gradient(gradient, head, LIVE[live])
    assert found.dtype == dtype and close(found, expected, 1e-6 if dtype == torch.float32 else 4e-3)
    total = torch.ones(WIDTH, HIDDEN)
    for columns in LIVE[live]:
        products.add_head_gradient(total[columns], gradient[:, columns], hidden)
    assert close(total, 1 + (gradient * alive).t() @ hidden.double(), 1e-6)
