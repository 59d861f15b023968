"""Which checkpoints a training keeps, and what an export holds on to while it removes the others."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.config import UserError
from pipelines.trainer.checkpoints import surplus
from pipelines.trainer.kept_checkpoint import _hold


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "step-0000010"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "__0_0.distcp").write_bytes(b"weights")
    (path / "sizes.json").write_text(json.dumps({"weights/__0_0.distcp": 7}))
    return path


def test_files_stay_after_the_training_has_removed_them(checkpoint: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    _hold(checkpoint, held)
    assert (held / "weights" / "__0_0.distcp").samefile(checkpoint / "weights" / "__0_0.distcp"), "no second copy"
    shutil.rmtree(checkpoint)
    assert (held / "weights" / "__0_0.distcp").read_bytes() == b"weights"


def test_a_checkpoint_that_is_being_removed_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "weights" / "__0_0.distcp").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="found that the training has removed it"):
            _hold(checkpoint, tmp_path / "held")
        shutil.rmtree(checkpoint, ignore_errors=True)


@pytest.mark.parametrize(
    ("keep", "best", "gone"),
    [
        (2, 0, [10, 20, 30]),
        (2, 1, [10, 30]),
        (1, 2, [10, 30, 40]),  # 20 is as good as 50, the last; 30 was saved without a validation
        (1, 3, [10, 30]),
        (9, 0, []),
    ],
)
def test_the_best_stay_beside_the_last(tmp_path: Path, keep: int, best: int, gone: list[int]) -> None:
    losses = {10: 4.0, 20: 2.0, 30: None, 40: 3.0, 50: 2.0}
    for step, loss in losses.items():
        (tmp_path / f"step-{step:07d}").mkdir()
        (tmp_path / f"step-{step:07d}" / "about.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    (tmp_path / "step-0000005").mkdir()  # from before losses were recorded
    found = surplus(sorted(tmp_path.iterdir()), keep, best)
    assert [int(path.name[5:]) for path in found] == ([5, *gone] if keep < 9 else [])
