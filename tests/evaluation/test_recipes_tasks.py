"""The tasks that shipped experiments name, held to the harness's registry without their data."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from pipelines import gates
from pipelines.artifacts import StageContext
from pipelines.compose import compose
from pipelines.config import UserError
from pipelines.evaluation import harness
from pipelines.evaluation.harness import Task
from pipelines.stages import fetch, plan

EXPERIMENTS = ("llama31_8b_to_4b_width", "llama31_8b_to_4b_depth", "validate_published_student")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_harness_knows_every_task_shot_and_metric(name: str) -> None:
    config = compose([f"experiment={name}"])
    found = {row["task"]: row for row in plan._tasks(config, config.evaluate.tasks.names)}
    assert found.keys() == config.evaluate.tasks.shots.keys() == config.evaluate.tasks.published["student"].keys()
    assert found["mmlu"]["kind"] == "group" and found["mmlu"]["tasks"] == 57 and found["mmlu"]["data"] == ["cais/mmlu"]
    assert found["arc_challenge"]["shots"] == 25 and found["winogrande"]["data"] == ["allenai/winogrande"]
    published = config.evaluate.tasks.published
    assert (
        published["student"]["mmlu"] == (0.587 if "depth" in name else 0.605) and published["teacher"]["mmlu"] == 0.653
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Task("winogrand", "winogrand"), "expected a task of the harness, found 'winogrand'; there are .*winogrande"),
        (Task("truthfulqa_mc2", "truthfulqa_mc2", 5), "evaluate.tasks.shots.truthfulqa_mc2=5: expected 0"),
        (Task("hellaswag", "hellaswag", None, "f1"), "evaluate.tasks.metrics.hellaswag: expected one of acc, acc_norm"),
    ],
)
def test_what_the_harness_does_not_know_is_named(task: Task, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        harness.described([task])


def test_the_gates_of_the_proof_are_half_a_point_around_what_is_published() -> None:
    config = compose(["experiment=validate_published_student"])
    for model, score in (("teacher", 0.653), ("student", 0.605)):
        bounds = [gate for gate in config.gates if gate.figure == f"{model}.tasks.mmlu"]
        assert [gate.above for gate in bounds if gate.above] == [pytest.approx(score - 0.005)]
        assert [gate.below for gate in bounds if gate.below] == [pytest.approx(score + 0.005)]


def test_data_that_was_fetched_is_read_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's answer is played by a data set of the same form; what is kept of it is the library's own."""
    rows = {"sentence": ["The cup is on _ now."], "option1": ["wood"], "option2": ["air"], "answer": ["1"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    files = {split: str(tmp_path / "rows.parquet") for split in ("train", "validation", "test")}
    real, hub = datasets.load_dataset, []

    def load(path: str, name: str | None = None, **settings: object) -> object:
        hub.append((path, name))
        cache = datasets.config.HF_DATASETS_CACHE
        found = real("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
        (made,) = (tmp_path / "made/parquet").glob("*/*/*/")
        kept = Path(cache) / path.replace("/", "___") / str(name) / "0.0.0" / made.name
        shutil.copytree(made, kept)
        info = json.loads((kept / "dataset_info.json").read_text())
        (kept / "dataset_info.json").write_text(json.dumps(info | {"config_name": name}))
        for file in kept.glob("parquet-*.arrow"):
            file.rename(file.with_name(file.name.replace("parquet", path.split("/")[1])))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load)
        patch.setattr(fetch, "_asked", lambda kind, name, *_, **__: hub.append((kind, name)))
        context = StageContext(
            compose(["fetch.tasks=[winogrande]", f"fetch.directory={tmp_path}/f"]), "fetch", tmp_path
        )
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert fetch.run(context)["winogrande"]["repositories"] == ["allenai/winogrande"]
    assert hub == [("dataset", "allenai/winogrande"), ("allenai/winogrande", "winogrande_xl")]
    with harness._cache(Task("winogrande", "winogrande"), tmp_path / "f/tasks"):
        loaded = harness._load(Task("winogrande", "winogrande", 0))
    assert [doc["sentence"] for doc in loaded["tasks"]["winogrande"].validation_docs()] == rows["sentence"]


def test_without_the_hub_a_task_s_data_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"fetch.tasks: expected the data of winogrande \(allenai/winogrande\) from the"
    ):
        harness.download(["winogrande"], tmp_path / "tasks")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_published_keeps_the_share_of_the_teacher_s_score_that_is_asked_for(name: str) -> None:
    config = compose([f"experiment={name}"])
    published = config.evaluate.tasks.published
    models = {model: {task: {"value": value} for task, value in row.items()} for model, row in published.items()}
    asked = [gate for gate in config.gates if gate.figure.startswith("student.tasks.") and gate.of == "teacher"]
    found = {"models": models, "tasks": {"models": models}}
    judged = gates.judge(asked, found)
    assert len(judged) >= 2 and all(gate["passed"] and gate["bound"] >= 0.8 for gate in judged)
    models["student"]["winogrande"]["value"] = 0.89 * 0.773
    assert sum(not gate["passed"] for gate in gates.judge(asked, found)) == 1


def test_another_teacher_has_no_published_scores_of_the_8b() -> None:
    config = compose(["experiment=llama32_3b_to_1b"])
    assert not any(config.evaluate.tasks.published.values())
    assert [gate.figure for gate in config.gates] == ["student.loss", "student.kl", "student.agreement"]
