"""What an export asks before it starts."""

import importlib.util
import json
from pathlib import Path

import pytest

from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.validation import export


def test_quantized_forms_are_scored_on_the_windows_of_the_finished_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    evaluation = tmp_path / "mine" / "evaluate"
    evaluation.mkdir(parents=True)
    then = {"evaluate.split": "test", "evaluate.sequence_length": 256, "evaluate.batches": None}
    (evaluation / "manifest.json").write_text(json.dumps({"settings": then | {"evaluate.micro_batch_size": 8}}))
    (evaluation / "complete").touch()
    mine = [f"run.directory={tmp_path}", "run.name=mine", "export.quantize=[int8]"]
    mine += ["evaluate.sequence_length=256", "evaluate.batches=null", "evaluate.micro_batch_size=4"]
    export.check(compose(mine), ["export"])
    other = compose([*mine, "evaluate.batches=4"])
    with pytest.raises(UserError, match=r"evaluate\.batches: expected null, with which the evaluation in .* found 4\."):
        export.check(other, ["export"])
    export.check(other, ["evaluate", "export"])
    export.check(compose([*mine, "evaluate.batches=4", "export.quantize=[]"]), ["export"])
