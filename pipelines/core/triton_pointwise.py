"""The pointwise terms of family.py as functions of a Triton kernel, under the same names; the derivations stand there.

log_p, log_q: fp32 blocks, finite. `name` is a constant of the compiled kernel, so that one divergence's code is left in
it. Triton has neither expm1 nor log1p that its interpreter knows, and its fast logarithm is wrong in the last digits
near 1, where equal models lie: both are written out here.
"""

import triton
import triton.language as tl

from pipelines.core.family import FAMILY

NAMES = ("forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "total_variation")
assert set(FAMILY) == set(NAMES), "a divergence of family.py has no pointwise terms here"


@triton.jit
def value(log_p, log_q, parameter, name: tl.constexpr):
    """f(p, q)."""
    if name == "forward_kl":
        return tl.exp(log_p) * (log_p - log_q)
    elif name == "reverse_kl":
        return tl.exp(log_q) * (log_q - log_p)
    elif name == "jensen_shannon":
        difference = log_p - log_q
        log_m = log_mixture(difference, parameter)
        teacher = tl.exp(log_p) * (tl.minimum(difference, 0.0) - log_m)
        student = tl.exp(log_q) * (tl.minimum(-difference, 0.0) - log_m)
        return parameter * teacher + (1 - parameter) * student
    elif name == "skew_kl":
        difference = log_p - log_q
        return tl.exp(log_p) * (tl.minimum(difference, 0.0) - log_mixture(difference, parameter))
    else:
        tl.static_assert(name == "total_variation")
        return 0.5 * tl.abs(tl.exp(log_p) - tl.exp(log_q))


@triton.jit
def slope(log_p, log_q, parameter, name: tl.constexpr):
    """g(p, q) = q * df/dq."""
    if name == "forward_kl":
        return -tl.exp(log_p)
    elif name == "reverse_kl":
        return tl.exp(log_q) * (log_q - log_p)
    elif name == "jensen_shannon":
        difference = log_p - log_q
        return (1 - parameter) * tl.exp(log_q) * (tl.minimum(-difference, 0.0) - log_mixture(difference, parameter))
    elif name == "skew_kl":
        return (parameter - 1) * tl.exp(tl.minimum(log_p, log_q) - log_mixture(log_p - log_q, parameter))
    else:
        tl.static_assert(name == "total_variation")
        difference = log_q - log_p
        half_sign = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, difference * 0))  # NaN where it is NaN
        return half_sign * tl.exp(log_q)


@triton.jit
def log_mixture(difference, share):
    """log(m / max(p, q)) of m = share * p + (1 - share) * q, from log p - log q: 0 where that is 0."""
    share_of_smaller = tl.where(difference > 0, 1 - share, share)
    return log1p(share_of_smaller * expm1(-tl.abs(difference)))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to fp32's precision relative to the result: the series up to x^8 where x > -1/2."""
    series = 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.5, series * x, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for -1 <= x <= 0, to fp32's precision relative to the result.

    Where x > -1/4 by s = x / (2 + x), log(1 + x) = 2 (s + s^3 / 3 + s^5 / 5 + ...), s^2 < 1 / 49.
    """
    s = x / (2.0 + x)
    square = s * s
    series = 2.0 / 9
    series = series * square + 2.0 / 7
    series = series * square + 2.0 / 5
    series = series * square + 2.0 / 3
    series = series * square + 2.0
    return tl.where(x > -0.25, series * s, tl.log(1.0 + x))
