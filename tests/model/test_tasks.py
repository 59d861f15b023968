"""Log-likelihoods of continuations against transformers in float64, row by row, at every layout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.families import ModelShape
from pipelines.questions import Question, score
from tests.model import cases_tasks
from tests.model.teachers import random_weights, write_teacher

SHAPE = ModelShape(51, 24, 40, 4, 4, 2, 6)  # an odd vocabulary: padded at TP 2
FOUND = "tests.model.cases_tasks:likelihoods"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    weights = random_weights(SHAPE)
    weights["lm_head.weight"] *= 6  # so that the choices differ
    return write_teacher(tmp_path_factory.mktemp("tasks") / "hf", SHAPE, weights)


@pytest.fixture(scope="module")
def expected(directory) -> list[float]:
    """The model reads all but the last id; of its logits the last `continuation` places count."""
    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).double().eval(), []
    for row in cases_tasks.rows(SHAPE.vocab_size):
        ids = torch.tensor(row.ids)
        with torch.no_grad():
            logs = model(ids[None, :-1]).logits[0].log_softmax(-1)
        found.append(logs[-row.continuation :].gather(1, ids[-row.continuation :, None]).sum().item())
    return found


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {}),
        (1, {"tokens_per_pass": 1}),  # a row per pass
        (1, {"tokens_per_pass": 1000}),  # all in one
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {}),  # two data-parallel ranks, an odd number of passes
        (4, {"tensor": 2, "pipeline": 2}),
    ],
    ids=["tp1", "one-row", "one-pass", "tp2-sp", "pp2", "dp2", "tp2-pp2"],
)
def test_equals_transformers_in_float64(ranks, directory, expected, world, layout):
    results = ranks(world, FOUND, directory=str(directory), **layout)
    for found in results:
        assert found == pytest.approx(expected, rel=2e-5)
        assert found == results[0]


def test_the_score_of_questions_is_that_of_float64(ranks, directory, expected):
    """Three choices per question; the characters are made up."""
    questions = [Question(n, ("c",) * 3, (" a", " bbbbb", " cc"), n % 3) for n in range(3)]
    wanted = score(questions, expected)
    found = score(questions, ranks(2, FOUND, directory=str(directory), tensor=2)[0])
    assert (found.accuracy, found.normalised) == (wanted.accuracy, wanted.normalised)
    assert found.log_probability == pytest.approx(wanted.log_probability, rel=1e-5)


def test_not_a_number_is_told_on_every_rank(ranks, directory):
    with pytest.raises(RuntimeError, match="UserError: prune.task: expected finite log-likelihoods"):
        ranks(2, FOUND, directory=str(directory), tensor=2, poison=True)


def test_fewer_rows_than_ranks(ranks, directory, expected):
    for found in ranks(2, FOUND, directory=str(directory), count=1):
        assert found == pytest.approx(expected[:1], rel=2e-5)
