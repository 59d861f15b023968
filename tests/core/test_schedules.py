"""Schedules by the step, and TAID's t against the formula written out, with its state carried over a restart."""

import json
import math

import pytest

from pipelines.core.schedules import AdaptiveInterpolation, Schedule


def test_a_schedule_goes_from_start_to_end_and_stays() -> None:
    linear = Schedule(1.0, 0.2, steps=8, first_step=2)
    assert [round(linear.value(step), 12) for step in (0, 2, 3, 6, 10, 99)] == [1.0, 1.0, 0.9, 0.6, 0.2, 0.2]
    cosine = Schedule(1.0, 3.0, steps=4, shape="cosine")
    wanted = [2 - math.cos(math.pi * step / 4) for step in range(5)]
    assert [cosine.value(step) for step in range(5)] == pytest.approx(wanted, rel=1e-12)
    assert (cosine.value(0), cosine.value(4), cosine.value(5)) == (1.0, 3.0, 3.0)
    constant = Schedule(0.7, 5.0, steps=3, shape="constant")
    assert {constant.value(step) for step in range(9)} == {0.7} and not constant.changes
    assert linear.changes and not Schedule(1.0, 1.0, steps=3).changes


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 3, "first_step": -1}, {"steps": 3, "shape": "square"}])
def test_what_is_no_schedule_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="schedule: expected"):
        Schedule(1.0, 0.0, **options)


LOSSES = [2.5, 2.4, 1.1, 1.4, 0.9, 0.9, 0.0, 0.3, 0.2]


def by_the_formula(losses: list[float], steps: int, start: float, end: float, alpha: float, beta: float) -> list[float]:
    """Plainly, with the first loss remembered only."""
    t, momentum, found = start, 0.0, []
    for number, loss in enumerate(losses, start=1):
        delta = 0.0
        if number > 1:
            before = losses[number - 2]
            momentum = beta * momentum + (1 - beta) * (before - loss) / (before + 1e-15)
            delta = alpha * (1 - t) / (1 + math.exp(-min(max(momentum, -700), 700)))
        t = min(end, max(start + (end - start) * number / steps, t + delta))
        found.append(t)
    return found


@pytest.mark.parametrize(("alpha", "beta", "steps"), [(5e-4, 0.99, 1000), (0.5, 0.5, 1000), (5e-4, 0.99, 12)])
def test_the_update_of_t(alpha: float, beta: float, steps: int) -> None:
    taid = AdaptiveInterpolation(steps=steps, alpha=alpha, beta=beta)
    assert taid.t == 0.4
    found = [taid.update(loss, step) for step, loss in enumerate(LOSSES, start=1)]
    assert found == pytest.approx(by_the_formula(LOSSES, steps, 0.4, 1.0, alpha, beta), rel=1e-12)
    assert found == sorted(found) and found[-1] > 0.4


def test_t_reaches_its_end_with_the_last_step_and_not_beyond() -> None:
    taid = AdaptiveInterpolation(steps=5, end=0.9)
    values = [taid.update(1.0, step) for step in range(1, 9)]
    assert values[4:] == [0.9] * 4 and all(value <= 0.9 for value in values)


def test_a_falling_loss_raises_t_faster_than_a_growing_one() -> None:
    falling, growing = (AdaptiveInterpolation(steps=10**6, alpha=0.1, beta=0.0) for _ in range(2))
    for step, loss in enumerate((1.0, 2.0, 4.0, 8.0), start=1):
        growing.update(loss, step)
        falling.update(1 / loss, step)
    assert falling.t > growing.t > 0.4


def test_a_restart_continues_to_the_last_bit() -> None:
    whole = AdaptiveInterpolation(steps=500, alpha=0.01)
    before = AdaptiveInterpolation(steps=500, alpha=0.01)
    for step, loss in enumerate(LOSSES, start=1):
        whole.update(loss, step)
        if step <= 4:
            before.update(loss, step)
    after = AdaptiveInterpolation(steps=500, alpha=0.01)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step, loss in enumerate(LOSSES[4:], start=5):
        after.update(loss, step)
    assert after.state_dict() == whole.state_dict()


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    taid = AdaptiveInterpolation(steps=500)
    taid.update(1.0, 1)
    state = taid.state_dict()
    for loss in (math.nan, math.inf):
        taid.update(loss, 2)
    assert taid.state_dict() == state


@pytest.mark.parametrize("options", [{"start": 0.9, "end": 0.5}, {"beta": 1.0}, {"alpha": -1.0}, {"end": 1.5}])
def test_what_is_no_interpolation_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="TAID: expected 0 <= start <= end <= 1"):
        AdaptiveInterpolation(steps=10, **options)
