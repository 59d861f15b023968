"""A model that cannot be held to the teacher token by token is a gap; what needs none of its tokens is measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import gates
from pipelines.compose import compose
from pipelines.config import Layout, UserError
from pipelines.evaluation.fitting import Fitting, fitting
from pipelines.evaluation_settings import EfficiencyConfig, GateConfig
from pipelines.model.random_model import write_random_model
from pipelines.text import tokenizer
from pipelines.validation import validate
from tests.ranks import RankPools
from tests.report import pages
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
TOKENS = "small/corpus/tokenizer"
PARTS = {
    "evaluate__generation__count": 2,
    "evaluate__generation__new_tokens": 4,
    "evaluate__generation__greedy": True,
    "evaluate__efficiency": EfficiencyConfig(batch_sizes=[1], prompt_tokens=[8], new_tokens=2, rounds=1),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("fitting") / "runs")


@pytest.fixture(scope="module")
def given(root: Path) -> dict[str, Path]:
    """Students of fewer ids, of other words than the teacher's, with weights that are not those of config.json, and
    with a tokenizer.json that was cut off."""
    directory = root / "given"
    tokenizer.train(iter(["other words than the teacher has, and fewer of them"] * 9), 270, directory / "tokenizer")
    shape = small_run.STUDENT.replace(vocab_size=280)
    write_random_model(directory / "fewer", shape, 7, std=0.3, tokenizer=directory / "tokenizer")
    for name in ("words", "broken", "torn"):
        shutil.copytree(root / "small/distil/hf", directory / name)
    change(directory / "broken/config.json", intermediate_size=32)
    path = directory / "words/tokenizer.json"
    model = json.loads(path.read_text())["model"]
    first, second = list(model["vocab"])[:2]
    model["vocab"] |= {first: model["vocab"][second], second: model["vocab"][first]}
    change(path, model=model)
    tokens = directory / "torn/tokenizer.json"
    tokens.write_text(tokens.read_text()[:100])
    return {name: directory / name for name in ("fewer", "words", "broken", "torn")}


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def evaluate(ranks: RankPools, root: Path, student: Path, world: int = 2, **settings: Any) -> dict[str, Any]:
    settings |= PARTS | {"evaluate__student": str(student), "parallel__tensor": world}
    for found in ranks(world, CASE, stage="evaluate", root=str(root), **settings):
        assert "error" not in found, found
    return dict(json.loads((root / "small/evaluate/results.json").read_text()))


def test_another_tokenizer_leaves_what_is_of_its_own_tokens(
    ranks: RankPools, root: Path, given: dict[str, Path]
) -> None:
    rows = [{"query": "def return", "choices": ["value for", "in"], "gold": number % 2} for number in range(3)]
    questions = root / "plain.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(ranks, root, given["fewer"], evaluate__tasks__names=[str(questions)])
    assert set(found["models"]) == {"teacher", "pruned"} and set(found["missing"]) == {"student"}
    reason = found["missing"]["student"]
    assert f"expected the teacher's vocabulary of {small_run.VOCABULARY} ids, found 280" in reason
    assert found["tasks"]["models"]["student"]["plain"]["samples"] == 3
    assert {row["model"] for row in found["efficiency"]["rows"]} == {"teacher", "pruned", "student"}
    model, own = AutoModelForCausalLM.from_pretrained(given["fewer"]), AutoTokenizer.from_pretrained(given["fewer"])
    sample = found["generation"]["models"]["student"]["samples"][0]
    ids = own(sample["prompt"], return_tensors="pt")["input_ids"]
    made = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert sample["text"] == own.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    told = gates.judge([GateConfig("student.tasks.plain", above=-1.0), GateConfig("student.kl", below=9.0)], found)
    assert told[0]["passed"] and not told[1]["passed"] and reason in told[1]["why"]
    page, results, _ = pages.make(root, "small")
    assert reason in page.text and "Scores on tasks" in page.text and results["missing"]["student"] == reason


def test_weights_that_are_not_those_of_config_json_are_one_gap(
    ranks: RankPools, root: Path, given: dict[str, Path]
) -> None:
    found = evaluate(ranks, root, given["broken"], 1)
    assert set(found["missing"]) == {"student"} and "expected tensors of the shape in config.json" in str(found)
    for part in ("models", "generation", "efficiency"):
        shown = found[part] if part == "models" else found[part]["models"]
        assert set(shown) == {"teacher", "pruned"}


def test_the_first_rank_alone_says_which_models_there_are(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    """The second rank sees no student where the first one does: both build and measure it."""
    shutil.copytree(root, tmp_path / "runs")
    case = "tests.stages.cases_evaluate:with_another_view"
    asked = {"root": str(tmp_path / "runs"), "parallel__tensor": 2}
    assert all(set(found) == {"teacher", "pruned", "student"} for found in ranks(2, case, timeout=120, **asked))
    (tmp_path / "runs/small/teacher/hf/config.json").unlink()
    assert all("UserError: evaluate: expected a teacher" in each["error"] for each in ranks(2, case, **asked))


def test_what_fits_passes_as_json(root: Path, given: dict[str, Path]) -> None:
    places = {"teacher": root / "small/teacher/hf", "student": given["words"]}
    found = fitting(root / "small/corpus", places, Layout(1, 1, 1, 1, 1, "cpu", False))
    assert Fitting.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_why_a_model_does_not_fit(root: Path, given: dict[str, Path]) -> None:
    corpus, places = root / "small/corpus", {"teacher": root / "small/teacher/hf"}
    layout = Layout(1, 1, 1, 1, 1, "cpu", False)
    for name, reason in {
        "words": "expected the teacher's tokenizer, found another one",
        "fewer": "found 280",
        "broken": "expected tensors of the shape",
        "torn": "torn/tokenizer.json: expected",
    }.items():
        found = fitting(corpus, places | {"student": given[name]}, layout)
        assert list(found.shapes) == ["teacher"] and reason in found.reasons["student"]
        assert list(found.whole) == ["teacher"] + ["student"] * (name != "broken")
        assert ("found another one" in found.reasons["student"]) == (name == "words")
    with pytest.raises(UserError, match="expected the model's vocabulary"):
        fitting(corpus, {"teacher": given["words"]}, layout)


def test_a_layout_that_divides_no_model_of_the_run_is_a_mistake_and_no_gap(root: Path) -> None:
    """A gap would stay: what is measured is taken from its parts, whatever the next run's layout."""
    places = {"teacher": root / "small/teacher/hf", "student": root / "small/odd"}
    write_random_model(places["student"], small_run.STUDENT.replace(num_hidden_layers=3), 7, tokenizer=root / TOKENS)
    for tensor, pipeline, expected in ((1, 2, "a divisor of the student's 3 layers"), (4, 1, "the teacher's 2 KV")):
        with pytest.raises(UserError, match=expected):
            fitting(root / "small/corpus", places, Layout(tensor * pipeline, tensor, pipeline, 1, 1, "cpu", False))
    assert list(fitting(root / "small/corpus", places, Layout(1, 1, 1, 1, 1, "cpu", False)).shapes) == list(places)


def test_evaluate_alone_refuses_no_student_that_is_given(root: Path, given: dict[str, Path]) -> None:
    """Of distil, which cannot go on without it, each is still a mistake that ends the command at once."""
    for name in given:
        settings = [f"run.directory={root}", "run.name=small", f"student.path={given[name]}", "parallel=tp1"]
        settings += [f"model.path={root}/small/teacher/hf", "teacher=take", "evaluate.sequence_length=16"]
        settings += ["teacher.sequence_length=16", "distil.sequence_length=16", "evaluate.efficiency.batch_sizes=[]"]
        validate(compose(settings), ["evaluate"])
        with pytest.raises(UserError):
            validate(compose(settings), ["distil", "evaluate"])
