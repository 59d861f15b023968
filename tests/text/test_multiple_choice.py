"""Requests become ids as transformers' tokenizer and lm-evaluation-harness's rule make them, written out here."""

import json
import random

import pytest
from transformers import AutoTokenizer

from pipelines.config import UserError
from pipelines.questions import Question
from pipelines.text import tokenizer
from pipelines.text.multiple_choice import encode

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "where", "was", "it", "then", "under", "some", "old", "tree"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=12)) for _ in range(50)]
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(iter(texts), 300, path)
    return path


def by_the_rule(directory, context: str, continuation: str, longest: int) -> tuple[list[int], int]:
    """(ids that end with the continuation's, how many these are)"""
    of = AutoTokenizer.from_pretrained(directory)

    def ids(text: str) -> list[int]:
        return of.encode(text, add_special_tokens=False)

    if not context:
        before, after = [of.bos_token_id], ids(continuation)
    else:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = ids(context)
        after = ids(context + continuation)[len(before) :]
    return (before + after)[-(longest + 1) :], len(after)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the cat", " sat on a mat"),
        ("the cat  ", " sat"),  # its spaces move to the continuation
        ("the cat sat on the", "mat"),  # no space between: ids may join over the border
        ("", " under some old tree"),
        ("   ", " under"),
        ("the cat" * 40, " sat on"),  # loses its left
        ("the <|end_of_text|> cat", " sat"),  # a special token by its name
        ("the cat", " été 42"),
    ],
)
def test_ids_are_those_of_the_rule(directory, context, continuation):
    question = Question(1, (context,) * 2, (continuation, " it"), 0)
    first = encode([question], directory, 300, 20)[0]
    if context.strip():
        assert (list(first.ids), first.continuation) == by_the_rule(directory, context, continuation, 20)
    else:  # nothing but spaces leaves no context either
        ids, count = by_the_rule(directory, "", context + continuation, 20)
        assert (list(first.ids), first.continuation) == (ids, count)
    assert len(first.ids) <= 21 and first.continuation < len(first.ids)


def test_rows_stand_in_the_order_of_the_choices(directory):
    questions = [Question(1, ("the", "a"), (" cat",) * 2, 0), Question(2, ("on",) * 3, (" a", " the", " it"), 1)]
    rows = encode(questions, directory, 300, 20)
    assert len(rows) == 5
    assert rows[3] == encode([Question(1, ("on",) * 2, (" the", " it"), 0)], directory, 300, 20)[0]


def test_a_tokenizer_of_another_model_is_refused(directory):
    with pytest.raises(UserError, match=r"at most the model's 250 ids, found id 2\d\d in prune.task, line 7"):
        encode([Question(7, ("the",) * 2, (" cat", " mat"), 0)], directory, 250, 20)


def test_a_choice_that_is_longer_than_the_model_reads_is_refused(directory):
    with pytest.raises(UserError, match="line 7: expected a choice of 1 to 2 tokens, found"):
        encode([Question(7, ("the",) * 2, (" qqqqqqqqqq", " mat"), 0)], directory, 300, 2)


def test_a_tokenizer_without_a_begin_is_refused(directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="expected a bos_token or eos_token"):
        encode([Question(1, ("the",) * 2, (" cat", " mat"), 0)], tmp_path, 300, 20)
