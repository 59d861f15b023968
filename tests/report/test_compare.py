"""Several runs on one page: what is shown, where it lies, when it is made again, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines import artifacts
from pipelines.__main__ import main
from pipelines.config import Config, UserError
from pipelines.report import compare, runs
from pipelines.stages import STAGES, report
from tests.report.pages import Page
from tests.report.test_page import write_whole_run

NAMES = ("one", "two", "three")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_runs(root: Path) -> None:
    """Three runs of one teacher: `two` has a better student, another temperature and no quantized form, `three`
    did not distil."""
    for name in NAMES:
        run = write_whole_run(root / name)
        inputs = {
            "corpus": {"path": "corpus", "files": {"data/test/a.bin": "ab" * 32, "data/train/a.bin": name}},
            "teacher": {"path": "teacher", "files": {"model.safetensors": "cd" * 32}},
        }
        change(run / "evaluate" / "manifest.json", inputs=inputs)
        settings = {"distil.temperature": 2.0 if name == "two" else 1.0, "distil.steps": 200}
        change(run / "distil" / "manifest.json", settings=settings)
    path = root / "two" / "evaluate" / "results.json"
    found = json.loads(path.read_text())
    found["models"]["student"] |= {"loss": 2.80, "intervals": {"loss": [2.79, 2.81]}}
    path.write_text(json.dumps(found))
    (root / "two" / "export" / "quantized.json").unlink()
    (root / "three" / "distil" / "metrics.jsonl").unlink()
    change(root / "three" / "distil" / "manifest.json", settings={})


def configured(root: Path, *names: str) -> Config:
    config = Config()
    config.run.directory, config.report.runs = str(root), list(names)
    return config


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("runs")
    write_runs(root)
    attempt = artifacts.begin(configured(root, *NAMES), "report")
    attempt.finish(report.run(attempt.context))
    directory = root / "comparisons" / "one+two+three"
    results = json.loads((directory / "results.json").read_text())
    return Page((directory / "index.html").read_text()), results, directory


def test_the_page_has_them_side_by_side(compared: tuple[Page, dict[str, Any], Path]) -> None:
    document, results, directory = compared
    text = " ".join(document.text.split())
    assert "The student of two has the lowest loss: 2.8000 nats/token against one 2.9300, three 2.9300." in text
    for shown in ("2.7900 to 2.8100", "student of two", "int8 of three", "distil.temperature 1.0 2.0 –", "mmlu 0.632"):
        assert shown in text, shown
    assert "distil.steps" not in text  # the same where it is known
    assert results["decision"]["recommended"] == {"run": "two", "name": "student"} and results["one_teacher"]
    assert list(results["runs"]) == list(NAMES) and not (directory.parent.parent / "quickstart").exists()
    drawings = {file.stem for file in (directory / "plots").glob("*.png")}
    assert drawings == {"quality_against_size", "quality_against_speed", "compared_ce", "compared_kd"}


def test_nothing_is_fetched_and_every_table_has_its_caption(compared: tuple[Page, dict[str, Any], Path]) -> None:
    tags = [tag for tag, _ in compared[0].elements]
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert tags.count("table") == tags.count("caption") == 5


def test_it_is_made_again_where_one_of_them_has_changed(compared: tuple[Page, dict[str, Any], Path]) -> None:
    root = compared[2].parent.parent
    config = configured(root, *NAMES)
    assert artifacts.examine(config, STAGES["report"]).state is artifacts.State.finished
    inputs = json.loads((compared[2] / "manifest.json").read_text())["inputs"]
    assert len(inputs) == 10 and all(name.startswith("runs[") for name in inputs)  # two files are not there
    with open(root / "one" / "distil" / "metrics.jsonl", "a") as file:
        file.write("\n")
    assert artifacts.examine(config, STAGES["report"]).state is artifacts.State.changed


def test_the_command_writes_a_place_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path)
    command = ["stage=report", f"run.directory={tmp_path}", "report.runs=[one,two]", "report.name=pair"]
    assert main(command) == 0
    assert (tmp_path / "comparisons" / "pair" / "index.html").is_file()
    assert (tmp_path / "comparisons" / "pair" / "logs" / "report.log").is_file()
    assert "Take the student of two" in capfd.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {*NAMES, "comparisons", ".hashes"}


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        ("results.json", {"split": "validation"}, "split validation"),
        ("results.json", {"tokens": 7}, "one has tokens 39936; two has tokens 7"),
        ("manifest.json", {"inputs": {"corpus": {"files": {"data/test/a.bin": "00" * 32}}}}, "corpus"),
    ],
)
def test_runs_on_other_text_are_refused(tmp_path: Path, where: str, values: dict[str, Any], message: str) -> None:
    write_runs(tmp_path)
    change(tmp_path / "two" / "evaluate" / where, **values)
    with pytest.raises(UserError, match="evaluated on the same text in the same windows, found: one has") as error:
        runs.read(configured(tmp_path, "one", "two"))
    assert message in str(error.value)


def test_students_of_other_teachers_are_shown_and_not_decided_between(tmp_path: Path) -> None:
    write_runs(tmp_path)
    path = tmp_path / "two" / "evaluate" / "manifest.json"
    inputs = json.loads(path.read_text())["inputs"]
    inputs["teacher"]["files"] = {"model.safetensors": "ef" * 32}
    change(path, inputs=inputs)
    records = runs.read(configured(tmp_path, "one", "two"))
    results = compare.results(records)
    assert not results["one_teacher"] and results["decision"]["recommended"] is None
    (tmp_path / "plots").mkdir()
    html = compare.render(records, results, tmp_path / "plots")
    assert "The runs have different teachers" in html and "teacher of two" in html
    with pytest.raises(UserError, match="evaluated on one teacher, found: one has teacher cdcd"):
        runs.refuse_other_teachers(records)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["report.runs=[one]"], "report.runs: expected two runs or more to compare, found 1"),
        (["report.runs=[one,two]", "report.name=a/b"], "report.name: expected a name without /"),
        (["report.runs=[one,two]", "report.name=" + "a" * 300], "report.name: expected at most 200 bytes"),
        (["report.runs=[one,twos]"], "Did you mean two?"),
    ],
)
def test_bad_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str) -> None:
    write_runs(tmp_path)
    assert main(["stage=report", f"run.directory={tmp_path}", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_run_elsewhere_is_named_by_its_directory(tmp_path: Path) -> None:
    write_runs(tmp_path / "there")
    records = runs.read(configured(tmp_path / "here", str(tmp_path / "there" / "one"), str(tmp_path / "there" / "two")))
    assert [record.name for record in records] == [str(tmp_path / "there" / name) for name in ("one", "two")]
