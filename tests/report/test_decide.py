"""Which variant to take: fronts, noise, limits and the one sentence, from made-up rows and through stage=decide."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.__main__ import main
from pipelines.report import decide, variants
from pipelines.report.decide import Limits
from tests.report.pages import make
from tests.report.test_page import write_whole_run
from tests.stages.sample_run import write_sample_run


def row(name: str, kind: str, size: float, loss: float, half: float | None = 0.02, **known: Any) -> dict[str, Any]:
    interval = None if half is None else [loss - half, loss + half]
    made = {"run": "a", "name": name, "kind": kind, "parameters": None, "bytes": size, "loss": loss, "kl": 0.1}
    made |= {"interval": interval, "agreement": None, "tokens_per_second": None, "speed": None, "measured": "test"}
    return made | known


ROWS = (
    row("teacher", "teacher", 100, 2.90),
    row("pruned", "pruned", 50, 5.40),
    row("student", "student", 50, 2.93),
    row("int8", "quantized", 13, 2.935),
    row("int4", "quantized", 8, 3.30),
)


def chosen(decision: decide.Decision) -> str | None:
    return None if decision.recommended is None else decision.rows[decision.recommended]["name"]


def test_the_smallest_within_noise_of_the_best_is_taken() -> None:
    decision = decide.decide(ROWS, Limits())
    assert chosen(decision) == "int8"
    assert [found["name"] for found in decision.rows if found["front_size"]] == ["teacher", "student", "int8", "int4"]
    assert [found["noise"] for found in decision.rows] == [True, True, False, None, True]
    assert decision.why.startswith("Take the quantized int8: of the variants it is the smallest whose loss, 2.9350")
    assert (
        "It has 13% of the teacher's bytes" in decision.why and "above the teacher's, more than noise" in decision.why
    )


@pytest.mark.parametrize(
    ("limits", "name", "said"),
    [
        (Limits(bytes=10), "int4", "it is the only one that keeps at most 10 B"),
        (Limits(bytes=1000), "teacher", "of the 5 variants that keep at most 1 kB it has the lowest loss"),
        (Limits(loss_below=2.934), "student", "smallest whose loss, 2.9300"),
        (
            Limits(bytes=5, loss_below=3),
            None,
            "No variant keeps at most 5 B and a loss below 3. The nearest is the quantized int4: size 8 B, loss",
        ),
        (Limits(tokens_per_second=10), None, "speed not known"),
    ],
)
def test_limits(limits: Limits, name: str | None, said: str) -> None:
    rows = [dict(found) for found in ROWS]
    for found in rows:
        found["interval"] = [found["loss"] - 0.03, found["loss"] + 0.03] if "smallest" in said else found["interval"]
    decision = decide.decide(rows, limits)
    assert chosen(decision) == name and said in decision.why


def test_without_intervals_the_lowest_loss_is_taken_and_noise_is_said_to_be_unknown() -> None:
    decision = decide.decide([found | {"interval": None} for found in ROWS], Limits())
    assert chosen(decision) == "student" and "how much of that is noise was not measured" in decision.why


def test_a_paired_difference_counts_more_than_intervals() -> None:
    one, other = row("student", "student", 50, 2.93), row("teacher", "teacher", 100, 2.90)
    assert variants.beyond_noise(one, other, {}) is True
    entry = {"figure": "loss", "model": "student", "other": "teacher", "larger_than_noise": False}
    assert variants.beyond_noise(one, other, {"a": [entry]}) is False
    assert variants.beyond_noise(other, one, {"a": [entry]}) is False
    assert variants.beyond_noise(one | {"interval": None}, other, {}) is None


def test_two_forms_are_told_apart_by_what_both_differ_from_the_student() -> None:
    """Their own intervals, of hard and easy documents alike, would hide it."""
    int8, int4 = row("int8", "quantized", 13, 2.930, half=0.25), row("int4", "quantized", 8, 2.945, half=0.25)
    entries = [
        {
            "figure": "loss",
            "model": name,
            "other": "student",
            "low": low,
            "high": low + 0.004,
            "larger_than_noise": True,
        }
        for name, low in (("int8", 0.001), ("int4", 0.016))
    ]
    assert variants.beyond_noise(int8, int4, {"a": []}) is False
    assert variants.beyond_noise(int8, int4, {"a": entries[:1]}) is False
    assert variants.beyond_noise(int8, int4, {"a": entries}) is True
    assert chosen(decide.decide([int8, int4], Limits(), {"a": entries})) == "int8"


def test_the_front_of_speed_compares_what_was_timed_in_the_same_way() -> None:
    timed = [
        row("teacher", "teacher", 100, 2.90, tokens_per_second=90, speed=variants.DECODE),
        row("student", "student", 50, 2.93, tokens_per_second=150, speed=variants.DECODE),
        row("pruned", "pruned", 50, 5.40, tokens_per_second=9000, speed=variants.FORWARD),
        row("slow", "quantized", 50, 5.00, tokens_per_second=80, speed=variants.DECODE),
    ]
    found = decide.decide(timed, Limits()).rows
    assert [entry["front_speed"] for entry in found] == [True, True, None, False]


def test_of_several_runs_the_teacher_counts_once_and_names_have_their_run() -> None:
    rows = [*ROWS[:3], *(found | {"run": "b", "loss": found["loss"] - 0.1} for found in ROWS[1:3])]
    rows += [ROWS[0] | {"run": "b"}, row("h64", "candidate", 40, 2.1, run="b", measured="elsewhere")]
    decision = decide.decide(rows, Limits())
    titles = [found["title"] for found in decision.rows]
    assert titles == ["teacher", "pruned of a", "student of a", "pruned of b", "student of b"]
    assert decision.why.startswith("Take the student of b:")


def test_nothing_to_decide_on() -> None:
    assert "Run stage=evaluate" in decide.decide([], Limits()).why
    assert "only the teacher" in decide.decide(ROWS[:1], Limits()).why


def test_forms_that_were_scored_on_other_windows_are_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_whole_run(tmp_path / "quickstart")
    path = run / "export" / "quantized.json"
    evaluation = json.loads((run / "evaluate" / "results.json").read_text())
    same = {"split": evaluation["split"], "tokens": evaluation["tokens"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | same))
    where = ["stage=decide", f"run.directory={tmp_path}", "format=json"]
    assert main(where) == 0
    assert json.loads(capsys.readouterr().out)["recommended"]["name"] == "int8"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 2048}))
    assert main(where) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["name"] == "student"
    assert {"int8", "int4"}.isdisjoint(entry["name"] for entry in found["variants"])
    told = "int8 and int4, since export measured them with tokens 2,048, evaluate its models with tokens "
    assert told + f"{evaluation['tokens']:,}" in found["why"] and "overwrite=true" in found["why"]
    document, results, _ = make(tmp_path)
    assert results["decision"]["recommended"]["name"] == "student"
    assert document.text.count("Not compared: int8 and int4") and "no measure for them: export" in document.text
    assert "| form, test split, 2,048 tokens |" in (run / "report" / "MODEL_CARD.md").read_text()


def test_the_stage_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_whole_run(tmp_path / "quickstart")
    where = ["stage=decide", f"run.directory={tmp_path}"]
    assert main(where) == 0
    printed = capsys.readouterr().out
    assert "Take the quantized int8" in printed and "recommended" in printed and "2.6 MB" in printed
    assert main([*where, "format=json", "decide.bytes=3e6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] == {"run": "quickstart", "name": "int4"}
    assert next(entry for entry in found["variants"] if entry["name"] == "student")["breaks"] == ["size 13.2 MB"]
    assert not (tmp_path / "quickstart" / "decide").exists()


def test_a_script_is_told_where_nothing_keeps_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_whole_run(tmp_path / "quickstart")
    where = ["stage=decide", f"run.directory={tmp_path}", "decide.bytes=1"]
    assert main(where) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("decide: No variant keeps at most 1 B. The nearest is the quantized int4: size")
    assert "int8" in printed.out and "No variant" not in printed.out
    assert main([*where, "format=json"]) == 2
    assert json.loads(capsys.readouterr().out)["recommended"] is None


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("pruned", "pruned", "Take the pruned model:"),
        ("teacher-int4", "quantized", "Take the teacher quantized to int4:"),
        ("int4", "quantized", "Take the quantized int4:"),
        ("student", "student", "Take the student:"),
    ],
)
def test_a_variant_is_named_once(name: str, kind: str, said: str) -> None:
    assert decide.decide([row(name, kind, 10, 1.0)], Limits()).why.startswith(said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.name=quickstart"], "expected evaluated models, found no evaluate/results.json"),
        (["report.runs=[quickstar]"], "report.runs[0]: expected a run with at least one stage"),
        (["report.runs=[quickstar]"], "Did you mean quickstart?"),
        (["report.runs=[quickstart,quickstart]"], "report.runs[1]: expected each run once"),
        (["report.runs=[quickstart]"], "expected evaluated runs, found no evaluate/results.json"),
        (["decide.bytes=0"], "decide.bytes: expected a number above 0, found 0"),
    ],
)
def test_what_cannot_be_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    write_sample_run(tmp_path / "quickstart", stages=("corpus", "teacher"))
    assert main(["stage=decide", f"run.directory={tmp_path}", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_limit_without_the_stage_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=plan", "decide.bytes=5", "report.runs=[a]", "report.name=b"]) == 0
    warned = capsys.readouterr().err
    for setting in ("decide.bytes", "report.runs", "report.name"):
        assert f"warning: {setting} has no effect without stage=" in warned


def test_it_answers_without_torch_or_drawing() -> None:
    code = (
        "import sys, pipelines.stages.decide; print([m for m in ('torch', 'matplotlib', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
