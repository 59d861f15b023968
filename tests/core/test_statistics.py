"""The bootstrap against a plain loop, and its interval against what theory says of a mean."""

import numpy
import pytest
import torch

from pipelines.core import statistics
from pipelines.core.statistics import add_by_group, interval, resampled


def test_resamples_equal_a_plain_loop() -> None:
    sums = torch.rand(37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(9)
    expected = []
    for _ in range(50):
        total = torch.zeros(3, dtype=torch.float64)
        for document in torch.randint(37, (37,), generator=generator).tolist():
            total += sums[document]
        expected.append(total)
    torch.testing.assert_close(resampled(sums, 50, 9), torch.stack(expected), rtol=1e-12, atol=0)


def test_the_interval_is_between_percentiles() -> None:
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = numpy.percentile(values.numpy(), [2.5, 97.5]).tolist()
    assert interval(values) == pytest.approx(tuple(expected), rel=1e-12)
    assert interval(torch.cat([values, torch.tensor([torch.nan, torch.inf])])) == interval(values)


@pytest.mark.parametrize("units", [1 << 14, 500], ids=["each document", "in groups"])
def test_the_interval_of_a_mean_is_as_wide_as_theory_says(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    monkeypatch.setattr(statistics, "MOST_UNITS", units)
    documents = torch.randn(2000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn = resampled(torch.stack([documents, torch.ones(2000, dtype=torch.float64)], dim=1))
    low, high = interval(drawn[:, 0] / drawn[:, 1])
    error = documents.std().item() / 2000**0.5
    assert low < documents.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.12)


def test_sums_by_group() -> None:
    sums = torch.zeros(3, 2, dtype=torch.float64)
    add_by_group(sums, torch.tensor([2, 0, 2]), torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]))
    assert sums.tolist() == [[2, 20], [0, 0], [5, 50]]
