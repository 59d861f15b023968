"""Scores in tasks: lm-evaluation-harness on the models of a small run, against our own sharded likelihoods."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import UserError
from pipelines.evaluation import task_files, tasks
from pipelines.evaluation.tasks import difference
from pipelines.evaluation_settings import GENERATED
from pipelines.text import indexed, tokenizer
from pipelines.text.splitting import SPLITS
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
MODELS = ("teacher", "pruned", "student")
QUESTIONS = {
    "plain": [
        {"query": "def return self", "choices": ["value for", "in", "self yield list range"], "gold": number % 3}
        for number in range(5)
    ],
    "contexts": [
        {"sentence": "self _ value for", "option1": "return", "option2": "def in", "answer": str(1 + number % 2)}
        for number in range(4)
    ],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("tasks") / "runs")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    for name, rows in QUESTIONS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(ranks: RankPools, root: Path, world: int = 2, **settings: Any) -> dict[str, Any]:
    given = {f"evaluate__tasks__{name}": value for name, value in settings.items() if "__" not in name}
    for found in ranks(world, CASE, stage="evaluate", root=str(root), **given):
        assert "error" not in found, found
    return dict(json.loads((root / "small/evaluate/results.json").read_text()))


def texts(root: Path, split: str) -> list[str]:
    corpus, found = root / "small/corpus", []
    held = tokenizer.load(corpus / "tokenizer")
    for prefix in sorted((corpus / "data" / split).glob("*.idx")):
        index = indexed.read_index(prefix.with_suffix(""))
        ids = indexed.read_ids(prefix.with_suffix(""), index)
        ends = [int(pointer) // index.id_type.itemsize for pointer in index.pointers]
        found += [
            held.decode([int(i) for i in ids[start : start + int(length) - 1]])
            for start, length in zip(ends, index.lengths, strict=True)
        ]
    return found


def test_what_is_made_from_held_out_text_is_of_no_other_document(root: Path, tmp_path: Path) -> None:
    corpus, held_out = root / "small/corpus", texts(root, "test")
    assert len(held_out) > 1 and not set(held_out) & {t for s in SPLITS if s != "test" for t in texts(root, s)}
    for name in GENERATED:
        path = task_files.write(corpus, "test", name, tmp_path / "a", questions=10, seed=1)
        again = task_files.write(corpus, "test", name, tmp_path / "b", questions=10, seed=1)
        other = task_files.write(corpus, "test", name, tmp_path / "c", questions=10, seed=2)
        rows = path.with_suffix(".jsonl").read_text()
        assert rows == again.with_suffix(".jsonl").read_text() != other.with_suffix(".jsonl").read_text()
        for row in map(json.loads, rows.splitlines()):
            whole = held_out[int(row["document"].split()[1])]
            if name == task_files.CLOZE:
                assert whole.rstrip().endswith(row["query"] + " " + row["word"]) and " " not in row["word"]
                continue
            assert row["query"] + " " + row["choices"][row["gold"]] in whole
            assert {len(choice) for choice in row["choices"]} == {task_files.CONTINUATION}
            assert len(set(row["choices"])) == task_files.CHOICES
            assert all(any(choice in text for text in held_out) for choice in row["choices"])


def test_a_split_without_enough_text_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected documents in the split 'nowhere'"):
        task_files.write(root / "small/corpus", "nowhere", task_files.CHOICE, tmp_path, questions=1, seed=1)


def test_every_model_is_scored_and_compared(ranks: RankPools, root: Path, files: Path) -> None:
    names = [*GENERATED, str(files / "plain.jsonl"), str(files / "contexts.jsonl")]
    published = {"teacher": {"plain": 0.4}}
    found = run(ranks, root, names=names, questions=6, published=published)
    assert not found["missing"] and found["tasks"]["published"] == published
    assert found["tasks"]["harness"].startswith("lm-eval ")
    for name in MODELS:
        scores = found["tasks"]["models"][name]
        assert set(scores) == {*GENERATED, "plain", "contexts"}
        assert [scores[task]["samples"] for task in ("plain", "contexts")] == [5, 4]
        assert scores["corpus_cloze"]["metric"] == "acc" and scores["corpus_cloze"]["all"]["perplexity"] > 1
        assert scores["corpus_choice"]["metric"] == "acc_norm" and scores["corpus_choice"]["shots"] == 0
        assert scores["corpus_choice"]["all"]["acc"] == scores["corpus_choice"]["value"]  # all choices of one length
    assert len(found["tasks"]["differences"]) == 4 * 3
    row = found["tasks"]["differences"][0]
    assert row["low"] <= row["difference"] <= row["high"] and row["larger_than_noise"] in (True, False)


@pytest.mark.parametrize("name", ["plain", "contexts", "corpus_choice"])
def test_our_own_sharded_likelihoods_give_the_same_accuracy(
    ranks: RankPools, root: Path, files: Path, name: str
) -> None:
    """lm-eval on transformers against questions.py, text/multiple_choice.py and model/tasks.py at TP 2."""
    file = root / f"small/evaluate/task_files/{name}.jsonl" if name == "corpus_choice" else files / f"{name}.jsonl"
    found = run(ranks, root, names=[name if name == "corpus_choice" else str(file)])
    for model, place in zip(MODELS, ("teacher/hf", "prune/hf", "distil/hf"), strict=True):
        ours = ranks(
            2, "tests.evaluation.cases_tasks:accuracy", directory=str(root / "small" / place), questions=str(file)
        )
        theirs = found["tasks"]["models"][model][name]["all"]
        assert ours[0] == ours[1] == pytest.approx([theirs["acc"], theirs["acc_norm"]])


def test_a_mistake_in_one_task_is_a_gap_in_that_task(ranks: RankPools, root: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "runs")
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n')
    (tmp_path / "empty.yaml").write_text("task: empty\ndataset_path: json\noutput_type: multiple_choice\n")
    (tmp_path / "wrong.yaml").write_text(
        "task: wrong\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\noutput_type: multiple_choice\n"
    )
    made = [str(tmp_path / name) for name in ("bad.jsonl", "empty.yaml", "wrong.yaml")]
    names = [*made, "no_such_task", str(files / "plain.jsonl")]
    found = run(ranks, tmp_path / "runs", names=names, metrics={"plain": "acc"})
    assert set(found["missing"]) == {"tasks.bad", "tasks.empty", "tasks.wrong", "tasks.no_such_task"}
    assert "line 1: expected a question with the fields" in found["missing"]["tasks.bad"]
    assert "empty: expected data_files or data_dir under dataset_kwargs" in found["missing"]["tasks.empty"]
    assert "wrong: expected a task file that the harness runs" in found["missing"]["tasks.wrong"]
    assert "expected a task of the harness, found 'no_such_task'" in found["missing"]["tasks.no_such_task"]
    assert set(found["tasks"]["models"]["student"]) == {"plain"}
    assert found["tasks"]["models"]["student"]["plain"]["metric"] == "acc"


def test_a_model_that_computes_no_numbers_is_a_gap(ranks: RankPools, root: Path, files: Path, tmp_path: Path) -> None:
    """The quality of such a model ends the stage, so the tasks alone are tried."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(root / "small/distil/hf", tmp_path / "hf")
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path, {"format": "pt"})
    (found,) = ranks(
        1,
        "tests.evaluation.cases_tasks:measure",
        directories={"teacher": str(root / "small/teacher/hf"), "student": str(tmp_path / "hf")},
        corpus=str(root / "small/corpus"),
        names=[str(files / "plain.jsonl")],
    )
    assert "student: " in found["missing"]["plain"] and "expected finite logits" in found["missing"]["plain"]
    assert found["models"]["teacher"]["plain"]["samples"] == 5 and not found["models"]["student"]


def test_pairs_that_are_scored_are_kept(ranks: RankPools, root: Path, files: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "runs")
    evaluate = tmp_path / "runs/small/evaluate"
    shutil.rmtree(evaluate, ignore_errors=True)
    evaluate.mkdir()
    inputs = {name: {"path": "", "files": {"config.json": name}} for name in ("teacher", "start", "student")}
    (evaluate / "manifest.json").write_text(json.dumps({"inputs": inputs}))
    plain, contexts = (str(files / f"{name}.jsonl") for name in QUESTIONS)
    run(ranks, tmp_path / "runs", names=[plain])
    kept = evaluate / "parts/tasks/student.plain.json"
    kept.write_text(kept.read_text().replace('"samples": 5', '"samples": 55'))
    found = run(ranks, tmp_path / "runs", names=[plain, contexts])["tasks"]["models"]["student"]
    assert found["plain"]["samples"] == 55 and found["contexts"]["samples"] == 4
    found = run(ranks, tmp_path / "runs", names=[plain, contexts], limit=2)["tasks"]["models"]["student"]
    assert found["plain"]["samples"] == 2  # made from other settings


def test_without_the_harness_there_is_a_gap_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.evaluation import harness

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"expected lm-evaluation-harness, found none. Install it: pip install"):
        harness.version()


def test_answers_to_the_same_questions_are_compared_in_pairs() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    ours = (random.random(200) < 0.6).astype(float)
    theirs = np.where(random.random(200) < 0.9, ours, 1 - ours)
    scores = [{"value": s.mean(), "stderr": s.std(ddof=1) / 200**0.5, "scores": s.tolist()} for s in (ours, theirs)]
    found = difference(*scores)
    half = 1.959964 * (ours - theirs).std(ddof=1) / 200**0.5  # without the half questions that are added
    assert found["difference"] == pytest.approx(ours.mean() - theirs.mean())
    expected = (found["difference"] - half, found["difference"] + half)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=0.01)
    alone = difference(*({**score, "scores": None} for score in scores))
    assert alone["high"] - alone["low"] > 1.5 * (found["high"] - found["low"])
    assert difference(scores[0], {**scores[1], "scores": None, "stderr": None})["larger_than_noise"] is None


def test_a_reason_that_all_models_have_is_told_once() -> None:
    same = dict.fromkeys(("teacher", "student"), "bad.jsonl, line 1: no question.")
    assert tasks.in_words(same, 2) == "bad.jsonl, line 1: no question."
    assert tasks.in_words(same, 3) == "; ".join(f"{name}: {why}" for name, why in same.items())
    assert tasks.in_words(same | {"student": "out of memory"}, 2).endswith("student: out of memory")
