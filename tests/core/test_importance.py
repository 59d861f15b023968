"""The streamed sums against the formula written out over all samples at once, in float64."""

import pytest
import torch

from pipelines.core.importance import ActivationNorm, BlockInfluence, first_non_finite, head_scores, hidden_scores


def direct_scores(activations: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """activations: (samples, sequence, channels); mask: (samples, sequence). Sample by sample, in float64."""
    means = [a[m].double().abs().mean(0) for a, m in zip(activations, mask, strict=True) if m.any()]
    return torch.stack(means).pow(2).sum(0).sqrt()


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
        norm.update(part.transpose(0, 1), kept.t())
    torch.testing.assert_close(norm.squares.sqrt(), direct_scores(activations, mask), rtol=1e-6, atol=0)


def test_masked_tokens_count_nowhere_even_when_not_finite(activations, mask):
    spoilt = activations.masked_fill(~mask.unsqueeze(-1), float("nan"))
    norm = ActivationNorm(12)
    norm.update(spoilt.transpose(0, 1), mask.t())
    torch.testing.assert_close(norm.squares.sqrt(), direct_scores(activations, mask), rtol=1e-6, atol=0)


def test_sums_of_bfloat16_activations_are_not_rounded_to_bfloat16():
    activations = torch.full((1000, 1, 2), 1.0 + 2**-7, dtype=torch.bfloat16)
    norm = ActivationNorm(2)
    norm.update(activations, torch.ones(1000, 1, dtype=torch.bool))
    torch.testing.assert_close(
        norm.squares.sqrt(), torch.full((2,), 1.0 + 2**-7, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_memory_does_not_grow_with_the_samples(activations, mask):
    norm, influence = ActivationNorm(12), BlockInfluence()

    def held() -> int:
        return sum(v.numel() for part in (norm, influence) for v in vars(part).values() if isinstance(v, torch.Tensor))

    start = held()
    for _ in range(5):
        norm.update(activations.transpose(0, 1), mask.t())
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


def test_hidden_scores_add_the_norms_and_head_scores_join_the_channels_of_a_head():
    squares = torch.tensor([[9.0, 16.0], [1.0, 0.0]], dtype=torch.float64)
    assert hidden_scores(squares).tolist() == [4.0, 4.0]
    squares = torch.tensor([[9.0, 16.0, 0.0, 4.0], [144.0, 25.0, 1.0, 0.0]], dtype=torch.float64)
    assert head_scores(squares, 2).tolist() == [[5.0, 2.0], [13.0, 1.0]]


def test_first_non_finite_names_the_lowest_row():
    values = torch.zeros(5, 3)
    assert first_non_finite(values) is None
    values[4, 0], values[2, 2] = float("nan"), float("inf")
    assert first_non_finite(values) == 2
