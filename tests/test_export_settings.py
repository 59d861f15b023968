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


def test_a_form_is_scored_with_the_documents_kept_apart_as_the_evaluation_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    mine = finished(tmp_path, {"evaluate.document_mask": None, "distil.document_mask": True})
    with pytest.raises(UserError, match=r"evaluate\.document_mask: expected true, with which .* found false\."):
        export.check(compose(mine), ["export"])
    for same in ("evaluate.document_mask=true", "distil.document_mask=true"):
        export.check(compose([*mine, same]), ["export"])


def test_batches_of_each_rank_count_over_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    then = {"evaluate.batches": 2, "evaluate.micro_batch_size": 4}
    mine = finished(tmp_path, then, {"data": 2, "context": 2})
    mine += ["parallel.device=cpu", "parallel.processes=2", "parallel.tensor=1", "evaluate.micro_batch_size=4"]
    with pytest.raises(UserError, match=r"expected 2 micro batches of 4 on each of 4 data-parallel ranks") as caught:
        export.check(compose([*mine, "evaluate.batches=2"]), ["export"])
    assert "found 2 micro batches of 4 on each of 2 data-parallel ranks" in str(caught.value)
    assert "The layouts differ, in which evaluate.batches counts for each data-parallel rank" in str(caught.value)
    export.check(compose([*mine, "evaluate.batches=4"]), ["export"])
    with pytest.raises(UserError, match=r"evaluate\.batches: expected 2, .* found null\."):
        export.check(compose([*mine, "evaluate.batches=null"]), ["export"])


def finished(place: Path, settings: dict[str, object], layout: dict[str, int] | None = None) -> list[str]:
    """The settings of an export behind an evaluation that was made with these."""
    evaluation = place / "mine" / "evaluate"
    evaluation.mkdir(parents=True)
    (evaluation / "manifest.json").write_text(json.dumps({"settings": settings, "layout": layout or {}}))
    (evaluation / "complete").touch()
    return [f"run.directory={place}", "run.name=mine", "export.quantize=[int8]"]
