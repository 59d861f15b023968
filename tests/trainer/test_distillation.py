"""A distillation's settings, shortened."""

import pytest

from pipelines.config import DistilConfig
from pipelines.signals import SchedulesConfig


@pytest.mark.parametrize(("tokens", "steps", "warmup"), [(1, 1, 0), (50 * 16 * 256, 50, 5), (50 * 16 * 256 + 1, 51, 5)])
def test_shortened_keeps_shares(tokens: float, steps: int, warmup: int) -> None:
    from pipelines.trainer.distillation import shortened

    schedules = SchedulesConfig()
    schedules.kd.end, schedules.kd.steps, schedules.kd.first_step = 0.5, 100, 40
    given = DistilConfig(steps=200, warmup_steps=20, schedules=schedules, checkpoint_interval=1000)
    found = shortened(given, tokens)
    assert (found.steps, found.warmup_steps) == (steps, warmup)
    kd = found.schedules.kd
    assert kd.end == 0.5 and kd.steps == max(1, round(steps / 2)) and kd.first_step == min(steps - 1, round(steps / 5))
    assert found.schedules.ce.steps is None and found.checkpoint_interval == max(1, steps // 2)
    assert given.steps == 200 and given.schedules.kd.steps == 100
    assert found.learning_rate == given.learning_rate
