"""The report over whole, partial and hostile runs: the page as a browser reads it, its files, the closing table."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines import artifacts
from pipelines.config import Config, UserError
from pipelines.report import card, charts, page, search, summary
from pipelines.report.record import read_importance, read_metrics
from pipelines.stages import STAGES, report
from tests.report.pages import Page, make
from tests.stages.sample_run import sample_models, sample_search, write_sample_run

ALL = ("corpus", "teacher", "prune", "distil", "evaluate", "export")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("report")
    write_sample_run(root / "quickstart")
    return make(root)


def test_nothing_is_fetched_from_anywhere(whole: tuple[Page, dict[str, Any], Path]) -> None:
    document, _, directory = whole
    for tag, attributes in document.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "img")
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert not any(name.startswith("on") for name in attributes)
    text = (directory / "index.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_every_reference_has_one(whole: tuple[Page, dict[str, Any], Path]) -> None:
    document, _, directory = whole
    ids = [attributes["id"] for _, attributes in document.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (directory / "index.html").read_text()
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)


def test_every_part_of_a_whole_run_is_on_the_page(whole: tuple[Page, dict[str, Any], Path]) -> None:
    document, results, directory = whole
    assert (
        "closes 98.8% of the loss gap" in document.text and "keeps 56.6% of the teacher's parameters" in document.text
    )
    assert not results["missing"] and "has not run" not in document.text
    for shown in (
        "5,834,240",
        "2.9300",
        "91.3%",
        "88.7%",
        "0.0187",
        "Divergence by the teacher's entropy",
        "2 to 4",
        "Hidden channels",
        "Attention heads",
        "KL(teacher || student, T=1.0)",
    ):
        assert shown in document.text, shown
    for shown in ("0123456789ab-dirty", "2.13.0", "learning_rate: 0.001", "3 min 24 s", "seed 1234"):
        assert shown in document.text, shown
    drawings = [attributes for tag, attributes in document.elements if tag == "svg"]
    assert sum(found.get("class") != "graph" for found in drawings) == len(list((directory / "plots").glob("*.png")))
    assert len(drawings) == 13  # with the lineage
    for file in (directory / "plots").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_no_colour_of_a_plot_is_fixed(whole: tuple[Page, dict[str, Any], Path]) -> None:
    text = (whole[2] / "index.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--accent)" in drawings
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)


def test_results_have_the_promised_form(whole: tuple[Page, dict[str, Any], Path]) -> None:
    _, results, _ = whole
    assert results["models"] == sample_models()
    assert results["pruning_gap_closed"] == pytest.approx((5.40 - 2.93) / (5.40 - 2.90))
    assert results["parameters_kept"] == pytest.approx(3_301_440 / 5_834_240)
    assert results["student_minus_teacher"] == pytest.approx(0.03)
    assert results["stages"]["distil"]["seconds"] == 204.3 and results["stages"]["distil"]["complete"]
    entry = next(entry for entry in results["lineage"] if entry["stage"] == "distil")
    assert set(entry["inputs"]) == {"corpus", "teacher", "start"}
    assert re.fullmatch(r"[0-9a-f]{64}", entry["inputs"]["teacher"]["sha256"])
    assert entry["git"].startswith("0123456789abcdef") and entry["versions"]["torch"] == "2.13.0"


def test_the_card_has_the_figures_and_the_lineage(whole: tuple[Page, dict[str, Any], Path]) -> None:
    text = (whole[2] / "MODEL_CARD.md").read_text()
    assert "| Loss (nats/token) | 2.9000 | 5.4000 | 2.9300 |" in text
    assert "return_token_type_ids=False" in text
    assert "- distil: corpus sha256 " in text and "code 0123456789abcdef" in text
    assert text.startswith("---\nlibrary_name: transformers") and "\n\n\n" not in text


@pytest.mark.parametrize("stages", [ALL[:number] for number in range(1, len(ALL))])
def test_a_partial_run_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stages: tuple[str, ...]
) -> None:
    write_sample_run(tmp_path / "quickstart", stages=stages)
    document, results, _ = make(tmp_path)
    absent = ALL[len(stages) :]
    words = f"not in this report: {', '.join(absent)}. stage=[{','.join(absent)},report] adds them."
    printed = capsys.readouterr().out
    assert words in document.text and words in printed.replace("\n", " ")
    assert results["pending"] == list(absent)
    if "evaluate" not in stages:
        assert "No verdict yet" in document.text and "the evaluate stage has not run" in document.text
        assert results["models"] == {} and "Parameters" not in printed
    assert ("exported model" in printed) == ("export" in stages)
    for stage, reason in (("distil", "no curves of distillation"), ("prune", "no pruning in this run")):
        assert (reason in document.text) == (stage not in stages), stage
    assert document.text.count("not run") >= len(absent)


def test_a_search_is_on_the_page_and_in_the_results(tmp_path: Path) -> None:
    directory = write_sample_run(tmp_path / "quickstart")
    (directory / "prune" / "search.json").write_text(json.dumps(sample_search()))
    manifest = json.loads((directory / "prune" / "manifest.json").read_text())
    manifest["figures"] |= {"parameters_before": 5_834_240}
    (directory / "prune" / "manifest.json").write_text(json.dumps(manifest))
    document, results, made = make(tmp_path)
    found = results["search"]
    assert found["winner"] == "h208-f480-a8-g4-l5" and len(found["measured"]) == 8 and "source" not in found
    assert (
        "h256-f768-a8-g4-l8" in found["candidates"] and "h256-f768-a8-g4-l8" not in document.text
    )  # of another search
    for shown in (
        "The search for a shape",
        "3.1800 after distillation",
        "512 candidates kept the limits, 8 were measured, 3 were followed further",
        "modelled for H100 in bf16",
        "3,241,440 (55.6%)",
        "Candidates against size",
        "Candidates against speed",
        "Distilled",
    ):
        assert shown in document.text, shown
    assert "Validation" not in document.text  # nothing to show in that column
    rows = [row["name"] for row in search.candidates(sample_search())]
    assert rows[:3] == ["h208-f480-a8-g4-l5", "h192-f512-a8-g4-l6", "h224-f576-a8-g4-l4"]
    assert (made / "plots" / "search_parameters.png").is_file()
    assert search.section({}, None, tmp_path) is None


def test_models_that_were_not_evaluated_have_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_sample_run(tmp_path / "quickstart")
    path = run / "evaluate" / "results.json"
    evaluation = json.loads(path.read_text())
    del evaluation["models"]["student"]
    path.write_text(json.dumps(evaluation))
    make(tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"pruned\s+3,301,440", printed) and not re.search(r"student\s+[\d–]", printed)


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_run_without_a_finished_stage_has_no_report(tmp_path: Path, unfinished: bool) -> None:
    (tmp_path / "quickstart").mkdir()
    if unfinished:
        run = write_sample_run(tmp_path / "quickstart", stages=("corpus",))
        (run / "corpus" / "complete").unlink()
    with pytest.raises(UserError, match="expected at least one finished stage in .*/quickstart, found none"):
        make(tmp_path)
    assert not (tmp_path / "quickstart/report/index.html").exists()


def test_a_training_that_still_runs_has_its_curve(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "quickstart", stages=("corpus", "teacher"))
    for stage in ("corpus", "teacher"):
        (run / stage / "complete").unlink()
    document, results, _ = make(tmp_path)
    assert "Teacher's loss" in document.text and results["pending"] == list(ALL)


def test_a_report_is_made_again_without_asking_where_its_run_has_grown(tmp_path: Path) -> None:
    config = Config()
    config.run.directory = str(tmp_path)
    run = write_sample_run(tmp_path / "quickstart", stages=("corpus",))
    attempt = artifacts.begin(config, "report")
    report.run(attempt.context)
    attempt.finish({})
    assert artifacts.examine(config, STAGES["report"]).state is artifacts.State.finished
    (run / "evaluate").mkdir()
    (run / "evaluate" / "results.json").write_text("{}")
    assert artifacts.examine(config, STAGES["report"]).state is artifacts.State.changed
    attempt = artifacts.begin(config, "report")
    assert not (run / "report" / "index.html").exists()
    attempt.release()


def test_a_teacher_taken_as_it_is_has_no_curve_and_its_licence(tmp_path: Path) -> None:
    write_sample_run(tmp_path / "quickstart")
    (tmp_path / "quickstart/teacher/metrics.jsonl").unlink()
    teacher = tmp_path / "given"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    (teacher / "README.md").write_text("---\nlicense: llama3.1\nlanguage: en\n---\n# A model\n")
    (tmp_path / "quickstart/teacher/complete").unlink()
    document, results, directory = make(tmp_path, model__path=str(teacher))
    assert results["pending"] == []
    assert "it was taken as it is" in document.text and "llama3.1" in document.text
    assert results["licence"] == "llama3.1"
    assert 'license: "llama3.1"' in (directory / "MODEL_CARD.md").read_text()


def test_a_corpus_of_another_run(tmp_path: Path) -> None:
    write_sample_run(tmp_path / "quickstart")
    (tmp_path / "quickstart/corpus").rename(tmp_path / "corpus")
    document, results, _ = make(tmp_path, data__corpus=str(tmp_path / "corpus"))
    assert results["unigram_entropy"] == 6.91 and "given" in document.text and "not run" not in document.text
    assert results["pending"] == []


def test_the_scale_ends_at_the_lower_of_teacher_and_student() -> None:
    def places(teacher: float, pruned: float, student: float) -> tuple[float, float]:
        losses = {"teacher": teacher, "pruned": pruned, "student": student}
        scale = page._scale({role: {"parameters": 1, "loss": loss} for role, loss in losses.items()})
        assert scale
        return float(scale["position"]), float(scale["end"])

    assert places(teacher=3.0, pruned=5.0, student=3.5) == (75, 100)
    assert places(teacher=3.0, pruned=4.5, student=2.5) == (100, 75)
    assert places(teacher=3.0, pruned=5.0, student=6.0) == (0, 100)


def test_a_pruning_by_given_layers_has_no_scores(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    write_sample_run(tmp_path / "quickstart")
    save_file({}, tmp_path / "quickstart/prune/scores.safetensors")
    document, _, _ = make(tmp_path)
    assert "this pruning needed none" in document.text


def test_names_from_outside_are_text_and_never_markup(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    name = "a<b>&'\"{{7*7}}"
    run = write_sample_run(tmp_path / name)
    for stage in ALL:
        path = run / stage / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["inputs"] = {attack: {"path": attack, "files": {attack: "00"}}}
        manifest |= {"git": attack, "versions": {attack: attack}, "figures": {"loss": attack}, "finished": attack}
        path.write_text(json.dumps(manifest))
    path = run / "evaluate/results.json"
    evaluation = json.loads(path.read_text())
    del evaluation["models"]["student"]
    path.write_text(json.dumps(evaluation | {"split": attack, "missing": {"student": attack}}))
    document, _, _ = make(tmp_path, name, model__name=attack)
    assert not [tag for tag, _ in document.elements if tag in ("script", "img")]
    assert not [attributes for _, attributes in document.elements if "onerror" in attributes]
    assert document.text.count(attack) >= 6 and "a<b>&'\"{{7*7}}" in document.text


def test_a_line_cut_off_and_steps_written_twice(tmp_path: Path) -> None:
    rows = ['{"step": 1, "split": "train", "ce": 3.0}', '{"step": 2, "split": "train", "ce": 9.0}']
    rows += ['{"step": 2, "split": "train", "ce": 2.0}', '{"step": 3, "split": "train", "ce": NaN}', '{"step": 4, "sp']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.series("train", "ce") == [(1, 3.0), (2, 2.0)]


def test_a_damaged_file_is_an_error_and_not_a_gap(tmp_path: Path) -> None:
    write_sample_run(tmp_path / "quickstart")
    (tmp_path / "quickstart/evaluate/results.json").write_text('{"models": ')
    with pytest.raises(UserError, match="expected JSON, found an error at line 1"):
        make(tmp_path)


def test_kept_masks_follow_the_indices(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "quickstart")
    kept = json.loads((run / "prune/kept.json").read_text())
    kept["layers"] = [1, 2, 6]
    kept["ffn"] = {number: kept["ffn"][number] for number in ("1", "2", "6")}
    axes = {axis.name: axis for axis in read_importance(run / "prune/scores.safetensors", kept)}
    assert axes["layers"].kept[0].tolist() == [True, True, False, False, False, True]
    assert axes["ffn"].kept[2].sum() == 0 and axes["ffn"].kept[5].nonzero()[0].tolist() == kept["ffn"]["6"]
    assert axes["hidden"].kept[0].nonzero()[0].tolist() == kept["hidden"]
    assert (axes["hidden"].kept_units, axes["hidden"].units) == (192, 256)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((2.9, 5.4, 2.93), "closes 98.8% of the loss gap that pruning opened"),
        ((2.9, 5.4, 2.9001), "closes 99.9% of the loss gap"),
        ((2.9, 5.4, 2.80), "closes the whole loss gap that pruning opened and passes the teacher"),
        ((2.9, 5.4, 5.60), "is worse than the pruned model that it started from"),
        ((2.9, 2.9, 2.95), "pruning opened no gap to close"),
    ],
)
def test_verdicts(losses: tuple[float, float, float], words: str) -> None:
    models = {
        role: {"parameters": 100, "loss": loss}
        for role, loss in zip(("teacher", "pruned", "student"), losses, strict=True)
    }
    assert words in summary.judge(models).sentence


def test_ranges_and_durations() -> None:
    assert summary.ranges([0, 1, 2, 5, 9, 8]) == "0-2, 5, 8-9" and summary.ranges([]) == ""
    assert [page.duration(s) for s in (4.25, 59.99, 754.2, 7300)] == ["4.2 s", "60.0 s", "12 min 34 s", "2 h 1 min"]


def test_licence_of_a_file(tmp_path: Path) -> None:
    assert card.licence(tmp_path) is None
    (tmp_path / "LICENSE").write_text("\n   Apache License\n   Version 2.0\n")
    assert card.licence(tmp_path) == "Apache License"


def test_text_of_a_plot_is_escaped(tmp_path: Path) -> None:
    row = {"run": "r", "kind": "quantized", "interval": None}
    points = [(1.0, row | {"name": "<b>one</b>", "loss": 2.0}), (2.0, row | {"name": "$two", "loss": 1.0})]
    drawing = charts.variants(points, [], "size", "hostile", tmp_path)
    assert "&lt;b&gt;one" in drawing and "<b>" not in drawing and "$two" in drawing


def test_the_closing_table_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sample_run(tmp_path / "quickstart", stages=ALL)
    make(tmp_path)
    printed = capsys.readouterr().out
    for role, loss in (("teacher", "2.9000"), ("pruned", "5.4000"), ("student", "2.9300")):
        assert re.search(rf"{role}\s+[\d,]+\s+{loss}", printed)
    assert str(tmp_path / "quickstart/report/index.html") in printed and "quickstart/export/hf" in printed
