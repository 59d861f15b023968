"""The family of divergences between a teacher's and a student's distribution: each is defined here and nowhere else.

With p the teacher's and q the student's probabilities, softmax(logits / T) over the vocabulary without its padding,

    D(p, q) = sum_v f(p_v, q_v)                                   nats per token

A divergence is two pointwise functions of (log p_v, log q_v): its value f and its slope g = q * df/dq. The slope is
never df/dq alone, in which p / q overflows. As d q_u / d student_v = q_u ([u = v] - q_v) / T,

    d D / d student_v = sum_u (df/dq)_u q_u ([u = v] - q_v) / T = (g_v - q_v * sum_u g_u) / T

is the gradient of them all. A multiple of q added to g cancels in it, so a slope may leave one out.

    forward KL         f = p (log p - log q)                      g = -p, whose sum is -1
    reverse KL         f = q (log q - log p)                      g = q (log q - log p + 1), less q: the value itself
    JSD(beta)          f = beta p (log p - log m) + (1 - beta) q (log q - log m),  m = beta p + (1 - beta) q
                       g = (1 - beta) q (log q - log m), since the terms of dm/dq add up to -(1 - beta) m / m
    skew KL(alpha)     f = p (log p - log m),  m = alpha p + (1 - alpha) q         g = -(1 - alpha) p q / m
    total variation    f = |p - q| / 2                            g = q sign(q - p) / 2

(KL: arXiv 1503.02531; reverse: 2306.08543; JSD: 2306.13649, equation 2; skew: 2402.03898.) For equal logits each is
exactly 0. Where p or q underflows to 0 its logarithm is still finite, so that nothing is NaN.

Where a divergence is the mean of a log-ratio under one model, sum_v a_v (log a_v - log b_v), its sum can be taken
before the normalizers are known, in one read of the logits (`under`). With x = exp(z_a), Z = sum of exp(z):

    sum_v x_v (z_a - z_b)_v / Z_a - log Z_a + log Z_b
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pointwise = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Divergence:
    """One member of the family.

    in_words: its formula, with {parameter}, {other} = 1 - parameter and {temperature} to be filled in. value, slope: f
    and g of (log p, log q, parameter): fp32 of any shape. under: under which model it is the mean of a log-ratio, None
    where it is none. parameter: beta or alpha, strictly between 0 and 1; 0 where there is none.
    """

    name: str
    in_words: str
    value: Pointwise
    slope: Pointwise
    under: Literal["teacher", "student"] | None = None
    parameter: float = 0.0

    def words(self, temperature: float) -> str:
        """The divergence by its formula's name, e.g. "KL(teacher || student, T=1.0)"."""
        return self.in_words.format(
            parameter=self.parameter, other=round(1 - self.parameter, 12), temperature=float(temperature)
        )


def _forward_value(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return log_p.exp().mul_(log_p - log_q)


def _forward_slope(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return log_p.exp().neg_()


def _reverse_value(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return log_q.exp().mul_(log_q - log_p)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """log p - log q, and log(m / max(p, q)) of m = share * p + (1 - share) * q: both exactly 0 where p = q.

    m / max(p, q) = 1 + w (min / max - 1) with w the smaller one's share; min / max = exp(-|log p - log q|) <= 1.
    """
    difference = log_p - log_q
    share_of_smaller = (difference > 0).to(difference.dtype).mul_(1 - 2 * share).add_(share)
    return difference, difference.abs().neg_().expm1_().mul_(share_of_smaller).log1p_()


def _jensen_shannon_value(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    difference, log_m = _log_mixture(log_p, log_q, beta)
    teacher = difference.clamp(max=0).sub_(log_m).mul_(log_p.exp()).mul_(beta)
    student = difference.neg_().clamp_(max=0).sub_(log_m).mul_(log_q.exp()).mul_(1 - beta)
    return teacher.add_(student)


def _jensen_shannon_slope(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    difference, log_m = _log_mixture(log_p, log_q, beta)
    return difference.neg_().clamp_(max=0).sub_(log_m).mul_(log_q.exp()).mul_(1 - beta)


def _skew_value(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    difference, log_m = _log_mixture(log_p, log_q, alpha)
    return difference.clamp_(max=0).sub_(log_m).mul_(log_p.exp())


def _skew_slope(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """p q / m = min(p, q) / (m / max(p, q))."""
    _, log_m = _log_mixture(log_p, log_q, alpha)
    return torch.minimum(log_p, log_q).sub_(log_m).exp_().mul_(alpha - 1)


def _total_variation_value(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return log_p.exp().sub_(log_q.exp()).abs_().mul_(0.5)


def _total_variation_slope(log_p: Tensor, log_q: Tensor, _: float) -> Tensor:
    return torch.sign(log_q - log_p).mul_(log_q.exp()).mul_(0.5)


FORWARD_KL = Divergence(
    "forward_kl", "KL(teacher || student, T={temperature})", _forward_value, _forward_slope, under="teacher"
)
FAMILY: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        FORWARD_KL,
        Divergence(
            "reverse_kl", "KL(student || teacher, T={temperature})", _reverse_value, _reverse_value, under="student"
        ),
        Divergence(
            "jensen_shannon",
            "JSD(teacher, student, beta={parameter}, T={temperature})",
            _jensen_shannon_value,
            _jensen_shannon_slope,
            parameter=0.5,
        ),
        Divergence(
            "skew_kl",
            "KL(teacher || {parameter} * teacher + {other} * student, T={temperature})",
            _skew_value,
            _skew_slope,
            parameter=0.1,
        ),
        Divergence(
            "total_variation",
            "TV(teacher, student, T={temperature})",
            _total_variation_value,
            _total_variation_slope,
        ),
    )
}


def divergence_named(name: str, parameter: float | None = None) -> Divergence:
    """name: a key of FAMILY; parameter: beta or alpha, strictly between 0 and 1; None: 0.5 or 0.1, or there is none.

    Raises ValueError for an unknown name, a parameter that is out of range, or one where there is none.
    """
    if name not in FAMILY:
        raise ValueError(f"divergence: expected one of {', '.join(FAMILY)}, found {name}.")
    chosen = FAMILY[name]
    if parameter is None:
        return chosen
    if not chosen.parameter:
        raise ValueError(f"divergence parameter: expected none with {name}, found {parameter}. Leave it out.")
    if not 0 < parameter < 1:
        raise ValueError(f"divergence parameter: expected a number between 0 and 1 with {name}, found {parameter}.")
    return Divergence(name, chosen.in_words, chosen.value, chosen.slope, chosen.under, parameter)
