"""Gates: found in what was measured, judged, and an end with exit code 2, without measuring again."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import gates
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.evaluation_settings import GateConfig
from pipelines.validation import validate
from tests.stages import small_run

ROOT = Path(__file__).resolve().parent.parent
RESULTS: dict[str, Any] = {
    "models": {"teacher": {"loss": 2.0, "kl": 0.0, "perplexity": None}, "student": {"loss": 2.1, "kl": 0.1}},
    "tasks": {
        "models": {"teacher": {"arc_easy": {"value": 0.8}}, "student": {"arc_easy": {"value": 0.6}}},
        "missing": {"mmlu": "student: out of memory"},
    },
    "domains": {"law": {"models": {"student": {"loss": 3.0}, "teacher": {"loss": 2.5}}}},
    "missing": {"pruned": "no model in prune/hf; stage=prune has not finished.", "domains.news": "news.txt is empty."},
}


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        (GateConfig("student.kl", below=0.2), 0.1, True),
        (GateConfig("student.kl", below=0.1), 0.1, False),
        (GateConfig("student.loss", of="teacher", below=1.06), 1.05, True),
        (GateConfig("student.loss", of="teacher", above=1.06), 1.05, False),
        (GateConfig("student.tasks.arc_easy", of="teacher", above=0.7), 0.75, True),
        (GateConfig("student.domains.law.loss", below=3.5), 3.0, True),
        (GateConfig("student.domains.law.loss", of="teacher", below=1.1), 1.2, False),
    ],
)
def test_a_figure_is_found_and_held_to_its_bound(gate: GateConfig, value: float, passed: bool) -> None:
    (found,) = gates.judge([gate], RESULTS)
    side = "above" if gate.above is not None else "below"
    assert found["value"] == pytest.approx(value) and found["passed"] is passed
    assert found["bound"] == found[side] == getattr(gate, side) and f"expected {side}" in found["why"]


@pytest.mark.parametrize(
    ("figure", "of", "reason"),
    [
        ("pruned.kl", None, "stage=prune has not finished"),
        ("student.domains.news.loss", None, "not measured: news.txt is empty"),
        ("student.tasks.mmlu", None, "not measured: student: out of memory"),
        ("student.tasks.arc_esay", None, "Did you mean arc_easy?"),
        ("student.domains.law.kl", None, "There are loss"),
        ("student.generation.diversity", None, "there is no generation in student.generation.diversity"),
        ("student.kl", "teacher", "the teacher's is 0"),
        ("teacher.perplexity", None, "was not measured"),
        ("student.tasks", None, "is no number. Name one of arc_easy behind it"),
    ],
)
def test_a_gap_is_a_gate_that_failed(figure: str, of: str | None, reason: str) -> None:
    (found,) = gates.judge([GateConfig(figure, of, below=1.0)], RESULTS)
    assert found["value"] is None and found["passed"] is False
    assert reason in found["why"] and found["why"].startswith(figure)


@pytest.mark.parametrize("figure", ["student.kl", "student.tasks.arc_easy", "student.domains.law.loss"])
def test_of_a_model_that_is_missing_every_gate_tells_why(figure: str) -> None:
    """The other models have their figures in the parts, where the missing one has no entry."""
    teacher = {"models": {"teacher": {"arc_easy": {"value": 0.8}}}}
    text = {"law": {"models": {"teacher": {"loss": 2.5}}}}
    gap = {"student": "BROKEN WEIGHTS"}
    results = {"models": {"teacher": {"loss": 2.0}}, "tasks": teacher, "domains": text, "missing": gap}
    told = gates.judge([GateConfig(figure, below=1.0), GateConfig(figure, "teacher", below=1.0)], results)
    assert all("BROKEN WEIGHTS" in gate["why"] and "there is no" not in gate["why"] for gate in told)
    teacher["models"]["student"] = {"arc_easy": {"value": 0.6}}  # of another tokenizer: its tasks are measured
    assert gates.find(results, "student.tasks.arc_easy") == 0.6
    assert "Did you mean arc_easy?" in gates.judge([GateConfig("student.tasks.arc_esay", below=1.0)], results)[0]["why"]


def test_figures_of_export_are_of_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        json.dumps({"figures": {"relative_difference": 1e-6, "quantized": ["int8"]}})
    )
    (tmp_path / "quantized.json").write_text(json.dumps({"variants": [{"name": "int8", "loss": 2.2}]}))
    found = gates.measured(tmp_path, "export")
    names = ("export.relative_difference", "export.quantized.int8.loss")
    assert [gates.find(found, name) for name in names] == [1e-6, 2.2]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("{figure: student.kl}", "expected one of above and below, found neither. Write {figure: student.kl, below"),
        ("{figure: student.kl, above: 0, below: 1}", "found above and below. Write a gate for each. Write {"),
        ("{figure: export.relativ_difference, below: 1}", "Did you mean relative_difference?"),
        ("{figure: export.quantized.int8.loss, below: 1}", "one of export.quantize, of which there are none"),
        ("{figure: student.tasks.q, above: 0}", "one of evaluate.tasks.names, corpus_choice"),
        ("{figure: student.tasks.corpus_chioce, above: 0}", "Did you mean corpus_choice?"),
        ("{figure: student.kl, of: teacher, below: 1}", "whose divergence from itself is 0, found teacher"),
        ("{figure: student.domains.prose.kl, of: teacher, below: 1}", "whose divergence from itself is 0"),
        ("{figure: student.by_token_class, above: 0}", "expected student.by_token_class.NAME"),
        ("{figure: student.by_token_class.wrd_start.kl, above: 0}", "Did you mean word_start?"),
        (
            "{figure: student.loss.x, above: 0}",
            "expected student.loss, which is a number, found 'student.loss.x'. Leave",
        ),
        ("{figure: student.micro_batch_size, above: 0}", "expected a figure of student, found"),
        ("{figure: student.split, above: 0}", "expected a figure of student, found"),
        ("{figure: student.kl, blow: 1}", "gates[0].blow: there is no such setting. Did you mean below?"),
        ("{figure: student.kl, below: nan}", "expected a number, found nan. Give a finite number"),
        ("{figure: studnet.kl, below: 1}", "Did you mean student?"),
        ("{figure: student.lss, below: 1}", "Did you mean loss?"),
        ("{figure: student.domains.prsoe.loss, below: 1}", "Did you mean prose?"),
        ("{figure: student.domains.law.loss, below: 1}", "one of evaluate.domains, prose"),
        ("{figure: student.tasks.corpus_chioce, below: 1}", "Did you mean corpus_choice?"),
        ("{figure: student.tasks.mmlu, below: 1}", "one of evaluate.tasks.names, corpus_choice, corpus_cloze"),
        ("{figure: student, below: 1}", "expected student.NAME"),
        ("{figure: student.loss, of: student, below: 1}", "expected teacher or pruned, found student"),
        ("{figure: export.bytes, of: teacher, below: 1}", "none for a figure of export"),
        ("{figure: student.kl, below: inf}", "found inf. Give a finite number"),
        ("{figur: student.kl, below: 1}", "Did you mean figure?"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_at_once(gate: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(compose(["experiment=quickstart", f"gates=[{gate}]"]), ["plan"])
    assert message in str(error.value) and ("gates" in str(error.value) or "figur" in str(error.value))


def test_a_gate_on_a_part_that_is_not_asked_for_is_refused() -> None:
    gate = "gates=[{figure: student.generation.diversity.distinct_1, above: 0}]"
    validate(compose(["experiment=quickstart", gate]), ["plan"])
    with pytest.raises(UserError, match=r"expected evaluate\.generation\.count, which measures it"):
        validate(compose(["experiment=quickstart", gate, "evaluate.generation.count=0"]), ["plan"])


def test_the_last_line_is_short_where_a_figure_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gates.artifacts, "stage_directory", lambda config, stage: tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    config = compose(["gates=[{figure: student.tasks.mmlu, above: 0.6}]"])
    with pytest.raises(UserError) as error:
        gates.check(config, "evaluate")
    assert "failed: student.tasks.mmlu was not measured. What" in str(error.value)
    assert "Train longer" not in str(error.value) and "out of memory" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_gate_ends_with_exit_code_2_and_another_bound_measures_nothing_again(tmp_path: Path) -> None:
    root = small_run.write_small_run(tmp_path / "runs")
    settings = [f"run.directory={root}", "run.name=small", "evaluate.sequence_length=16", "evaluate.batches=2"]
    settings += ["evaluate.micro_batch_size=5", "stage=evaluate"]

    def run(gate: str, *launcher: str) -> tuple[int, str, list[str]]:
        command = [sys.executable, *launcher, "-m", "pipelines", *settings, "parallel=tp1", f"gates=[{gate}]"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr.splitlines()

    code, out, errors = run("{figure: student.kl, below: 1e-9}")
    assert code == 2 and "gate FAILED: student.kl is" in out and " s  " in out
    assert errors[-1].startswith("evaluate: 1 of 1 gates failed: student.kl is ") and "1e-09" in errors[-1]
    written = (root / "small/evaluate/results.json").read_text(), (root / "small/evaluate/complete").read_text()
    assert json.loads((root / "small/evaluate/gates.json").read_text())[0]["passed"] is False
    code, out, errors = run("{figure: student.kl, below: 100}")
    assert code == 0 and "finished already" in out and "gate passed: student.kl is" in out
    assert gates.read(root / "small")[0]["passed"] is True
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone", "--local-addr=127.0.0.1")
    code, _, errors = run("{figure: student.loss, of: teacher, above: 1e9}", *torchrun)
    assert code and any(line.startswith("evaluate: 1 of 1 gates failed: student.loss / teacher's") for line in errors)
    assert run("")[0] == 0 and not (root / "small/evaluate/gates.json").exists()
    assert written == tuple((root / f"small/evaluate/{name}").read_text() for name in ("results.json", "complete"))
