"""The streamed sums against the formula written out over all samples at once, in float64."""

import pytest
import torch

from pipelines.choices import Aggregation
from pipelines.core import importance
from pipelines.core.importance import (
    ActivationNorm,
    BlockInfluence,
    Counted,
    first_non_finite,
    hidden_scores,
    over_samples,
    over_sequence,
    unit_scores,
)


def direct_scores(activations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """activations: (samples, sequence, channels); mask: (samples, sequence). Sample by sample, in float64."""
    means = [a[m].double().abs().mean(0) for a, m in zip(activations, mask, strict=True) if m.any()]
    return torch.stack(means).pow(2).sum(0).sqrt()


def counted(mask: torch.Tensor) -> Counted:
    """mask: (sequence, batch)."""
    return Counted(mask.sum(0).float(), None if mask.all() else mask)


@pytest.fixture
def activations() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 10, 12) * torch.rand(6, 1, 12)


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.rand(6, 10, generator=torch.Generator().manual_seed(2)) < 0.7
    mask[3] = False
    mask[4] = True
    return mask


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_scores_equal_the_formula_for_any_batch_size(activations, mask, batch):
    norm = ActivationNorm(12)
    for part, kept in zip(activations.split(batch), mask.split(batch), strict=True):
        norm.update(part.transpose(0, 1), counted(kept.t()))
    torch.testing.assert_close(norm.total.sqrt(), direct_scores(activations, mask), rtol=1e-6, atol=0)


def test_masked_tokens_count_nowhere_even_when_not_finite(activations, mask):
    spoilt = activations.masked_fill(~mask.unsqueeze(-1), float("nan"))
    norm = ActivationNorm(12)
    norm.update(spoilt.transpose(0, 1), counted(mask.t()))
    torch.testing.assert_close(norm.total.sqrt(), direct_scores(activations, mask), rtol=1e-6, atol=0)


def test_sums_of_bfloat16_activations_are_not_rounded_to_bfloat16():
    activations = torch.full((1000, 1, 2), 1.0 + 2**-7, dtype=torch.bfloat16)
    norm = ActivationNorm(2)
    norm.update(activations, counted(torch.ones(1000, 1, dtype=torch.bool)))
    torch.testing.assert_close(norm.total.sqrt(), torch.full((2,), 1.0 + 2**-7, dtype=torch.float64), rtol=1e-6, atol=0)


def test_memory_does_not_grow_with_the_samples(activations, mask):
    norm, influence = ActivationNorm(12), BlockInfluence()

    def held() -> int:
        return sum(v.numel() for part in (norm, influence) for v in vars(part).values() if isinstance(v, torch.Tensor))

    start = held()
    for _ in range(5):
        norm.update(activations.transpose(0, 1), counted(mask.t()))
        influence.update(activations.transpose(0, 1), activations.transpose(0, 1), mask.t())
    assert held() == start == 12 + 2
    assert all(not isinstance(v, list | dict) for part in (norm, influence) for v in vars(part).values())


def test_block_influence_is_the_mean_distance_of_the_kept_tokens(activations, mask):
    outputs = activations + torch.randn(activations.shape, generator=torch.Generator().manual_seed(3))
    influence = BlockInfluence()
    for index in range(6):
        x, y, m = activations[index : index + 1], outputs[index : index + 1], mask[index : index + 1]
        influence.update(x.transpose(0, 1), y.transpose(0, 1), m.t())
    x, y = activations[mask].double(), outputs[mask].double()
    expected = 1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
    assert influence.sums[1] == mask.sum()
    torch.testing.assert_close(influence.sums[0] / influence.sums[1], expected, rtol=1e-6, atol=0)


OVER = {
    Aggregation.mean: lambda values, dim: values.abs().mean(dim),
    Aggregation.l1: lambda values, dim: values.abs().sum(dim),
    Aggregation.l2: lambda values, dim: values.norm(dim=dim),
    Aggregation.max: lambda values, dim: values.abs().amax(dim),
}


@pytest.mark.parametrize("over_the_samples", Aggregation)
@pytest.mark.parametrize("over_the_sequence", Aggregation)
def test_every_aggregation_is_its_formula_over_the_kept_tokens(activations, mask, over_the_sequence, over_the_samples):
    norm = ActivationNorm(12, sequence=over_the_sequence, samples=over_the_samples)
    for part, kept in zip(activations.split(4), mask.split(4), strict=True):
        norm.update(part.transpose(0, 1), counted(kept.t()))
    kept = [a[m].double() for a, m in zip(activations, mask, strict=True) if m.any()]
    expected = OVER[over_the_samples](torch.stack([OVER[over_the_sequence](a, 0) for a in kept]), 0)
    torch.testing.assert_close(over_samples(norm.total, len(kept), over_the_samples), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("aggregation", Aggregation)
@pytest.mark.parametrize("masked", [False, True])
def test_scales_of_tokens_and_channels_are_those_of_the_product_and_chunks_change_nothing(
    monkeypatch, activations, mask, aggregation, masked
):
    x, token, channel = activations.transpose(0, 1), torch.rand(10, 6), torch.randn(12)
    kept = mask.t() if masked else torch.ones(10, 6, dtype=torch.bool)
    plain, scaled = (ActivationNorm(12, sequence=aggregation) for _ in range(2))
    plain.update(x * token.unsqueeze(-1) * channel, counted(kept))
    monkeypatch.setitem(importance._CHUNK, "cpu", 3 * 6 * 12)  # three tokens
    scaled.update(x, counted(kept), token_scale=token, channel_scale=channel)
    torch.testing.assert_close(scaled.total, plain.total, rtol=1e-6, atol=0)


def test_no_nan_is_lost_in_a_maximum():
    activations = torch.tensor([[[1.0]], [[float("nan")]], [[2.0]]])
    assert over_sequence(activations, Aggregation.max).isnan().all()
    norm = ActivationNorm(1, sequence=Aggregation.max, samples=Aggregation.max)
    norm.update(activations, counted(torch.ones(3, 1, dtype=torch.bool)))
    assert norm.total.isnan().all()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_stays_so_in_a_maximum_over_ranks(monkeypatch, value):
    monkeypatch.setattr(importance.dist, "all_reduce", lambda *arguments, **named: None)
    norm = ActivationNorm(1, sequence=Aggregation.max, samples=Aggregation.mean)
    mask = torch.ones(2, 1, dtype=torch.bool)
    norm.update(torch.tensor([[[1.0]], [[float(value)]]]), counted(mask), sequence_group=object())
    assert not norm.total.isfinite().any()


def test_hidden_scores_add_the_norms_and_units_join_the_channels_of_a_head_or_a_group():
    assert hidden_scores(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist() == [4.0, 4.0]
    scores = torch.tensor([[3.0, 4.0, 0.0, 12.0], [12.0, 5.0, 1.0, 0.0]])
    assert unit_scores(scores, 2).tolist() == [[5.0, 12.0], [13.0, 1.0]]
    assert unit_scores(scores, 4)[0].tolist() == [13.0]


def test_first_non_finite_names_the_lowest_row():
    values = torch.zeros(5, 3)
    assert first_non_finite(values) is None
    values[4, 0], values[2, 2] = float("nan"), float("inf")
    assert first_non_finite(values) == 2
