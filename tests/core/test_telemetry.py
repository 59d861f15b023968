"""Bands and bins by hand, and that sums of parts are the sums of the whole."""

import pytest
import torch

from pipelines.core import telemetry
from pipelines.core.divergence import Telemetry


def seen(**rows: list[float]) -> Telemetry:
    count = len(next(iter(rows.values())))
    whole = {name: torch.tensor(rows.get(name, [0.5] * count)) for name in Telemetry._fields}
    return Telemetry(**whole)


def test_bands_by_hand() -> None:
    entropy = [-1e-9, 0.99, 1.0, 1.5, 9.0, 9.0]
    kd = torch.tensor([1.0, 3.0, 5.0, 7.0, 11.0, float("nan")])
    valid = torch.tensor([True] * 5 + [False])
    totals = telemetry.sums(seen(teacher_entropy=entropy), kd, valid).tolist()
    assert telemetry.by_entropy(totals) == {"0_1": 2.0, "1_2": 6.0, "4_up": 11.0}, "a band without tokens is left out"


def test_calibration_errors_by_hand() -> None:
    """Two tokens of the same bin balance each other, two of different bins do not."""
    student = {"student_confidence": [0.95, 0.95, 0.35], "student_correct": [1.0, 0.0, 0.0]}
    teacher = {"teacher_confidence": [1.0, 0.0, 0.2], "teacher_correct": [1.0, 0.0, 1.0]}  # the ends have bins too
    found = seen(**student, **teacher, teacher_entropy=[1.0] * 3)
    totals = telemetry.sums(found, torch.zeros(3), torch.ones(3, dtype=torch.bool)).tolist()
    assert len(totals) == telemetry.SIZE
    errors = telemetry.calibration_errors(totals, 3)
    assert errors == pytest.approx(((abs(1 - 1.9) + 0.35) / 3, 0.8 / 3), rel=1e-6)


def test_sums_of_parts_are_those_of_the_whole_and_means_of_parts_are_not() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(6, 40, generator=generator)
    rows[1] *= 6
    rows[2:4] = 0.48 + rows[2:4] / 20  # of one bin
    rows[4:] = (torch.arange(40) < 9).float()  # too sure in one part, not sure enough in the other
    found, kd, valid = Telemetry(*rows), torch.rand(40, generator=generator), torch.rand(40, generator=generator) < 0.7
    parts = [slice(0, 9), slice(9, 40)]
    whole = telemetry.sums(found, kd, valid)
    added = [telemetry.sums(Telemetry(*rows[:, part]), kd[part], valid[part]) for part in parts]
    torch.testing.assert_close(sum(added), whole, rtol=1e-12, atol=1e-12)
    counts = [int(valid[part].sum()) for part in parts]
    errors = [telemetry.calibration_errors(part.tolist(), count) for part, count in zip(added, counts, strict=True)]
    averaged = sum(error[0] * count for error, count in zip(errors, counts, strict=True)) / sum(counts)
    assert averaged > telemetry.calibration_errors(whole.tolist(), sum(counts))[0] + 0.01
