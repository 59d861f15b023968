"""The pointwise definitions: each slope is its value's, each is 0 for equal models, none is NaN at the edges."""

import pytest
import torch

from pipelines.config import Divergence as Setting
from pipelines.core.family import FAMILY, Divergence, divergence_named
from pipelines.validation.training import WITH_PARAMETER

MEMBERS = [
    *FAMILY.values(),
    divergence_named("jensen_shannon", 0.1),
    divergence_named("skew_kl", 0.7),
]


def log_probabilities(seed: int, spread: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = spread * torch.randn(2, 200, 31, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    log_p, log_q = logits.log_softmax(-1).unbind()
    return log_p, log_q


def named(member: Divergence) -> str:
    return f"{member.name}-{member.parameter}"


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_closed_form_is_the_gradient_of_the_value(member: Divergence) -> None:
    """Of the summed value through a softmax, by autograd in float64."""
    log_p, _ = log_probabilities(0, 3.0, torch.float64)
    logits = 3 * torch.randn(200, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    q = logits.softmax(-1)
    # The values are written in place; as plain functions of q they have a derivative all the same.
    plain = {
        "forward_kl": lambda p, q: p * (p / q).log(),
        "reverse_kl": lambda p, q: q * (q / p).log(),
        "jensen_shannon": lambda p, q: (
            member.parameter * p * (p / (member.parameter * p + (1 - member.parameter) * q)).log()
            + (1 - member.parameter) * q * (q / (member.parameter * p + (1 - member.parameter) * q)).log()
        ),
        "skew_kl": lambda p, q: p * (p / (member.parameter * p + (1 - member.parameter) * q)).log(),
        "total_variation": lambda p, q: (p - q).abs() / 2,
    }[member.name](log_p.exp(), q)
    log_q = q.detach().log()
    torch.testing.assert_close(member.value(log_p, log_q, member.parameter), plain.detach(), atol=1e-12, rtol=1e-10)
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    slope = member.slope(log_p, log_q, member.parameter)
    torch.testing.assert_close(slope - q.detach() * slope.sum(-1, keepdim=True), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_equal_models_give_exactly_zero(member: Divergence) -> None:
    log_p, _ = log_probabilities(2, 8.0, torch.float32)
    assert torch.count_nonzero(member.value(log_p, log_p.clone(), member.parameter)) == 0
    slope = member.slope(log_p, log_p.clone(), member.parameter)
    assert (slope - log_p.exp() * slope.sum(-1, keepdim=True)).abs().max() < 1e-6


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_never_negative_and_where_bounded_within_its_bound(member: Divergence) -> None:
    for spread in (0.01, 1.0, 30.0):
        total = member.value(*log_probabilities(3, spread, torch.float32), member.parameter).sum(-1)
        assert total.min() > -2e-6
        if member.name == "total_variation":
            assert total.max() < 1 + 1e-6
        if member.name == "jensen_shannon":
            assert total.max() < 0.6932


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_probabilities_that_underflow(member: Divergence) -> None:
    """log p and log q down to -3,000, in both directions: no NaN, no infinite slope."""
    log_p = torch.tensor([[-3000.0, 0.0, -200.0, -90.0, -1e-7, -3000.0]])
    log_q = torch.tensor([[0.0, -3000.0, -90.0, -200.0, -1e-7, -3000.0]])
    value = member.value(log_p, log_q, member.parameter)
    slope = member.slope(log_p, log_q, member.parameter)
    assert value.isfinite().all() and slope.isfinite().all()
    assert slope.abs().max() <= 3000


def test_the_settings_name_the_whole_family() -> None:
    assert {setting.value for setting in Setting} == set(FAMILY)
    with_parameter = {setting.value for setting in WITH_PARAMETER}
    assert with_parameter == {name for name, member in FAMILY.items() if member.parameter}


def test_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="one of forward_kl"):
        divergence_named("kl")
    with pytest.raises(ValueError, match="expected none with reverse_kl, found 0.5"):
        divergence_named("reverse_kl", 0.5)
    with pytest.raises(ValueError, match="between 0 and 1 with skew_kl, found 1.0"):
        divergence_named("skew_kl", 1.0)
