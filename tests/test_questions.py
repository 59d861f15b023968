"""Questions in the forms of lm-evaluation-harness become the requests that it makes of them."""

import json
import math

import pytest

from pipelines.config import UserError
from pipelines.questions import Question, read_questions, score

ROWS = {
    "processed": (
        {"query": "Is it?", "choices": ["yes", "no", "who knows"], "gold": 1},
        Question(1, ("Is it?",) * 3, (" yes", " no", " who knows"), 1),
    ),
    "arc": (
        {
            "id": "x",
            "question": "Which floats?",
            "choices": {"text": ["iron", "wood"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        Question(1, ("Question: Which floats?\nAnswer:",) * 2, (" iron", " wood"), 1),
    ),
    "arc by numbers": (
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "1"},
        Question(1, ("Question: q\nAnswer:",) * 2, (" a", " b"), 0),
    ),
    "mmlu": (
        {"question": "Which floats? ", "choices": ["iron", "wood"], "answer": 1, "subject": "physics"},
        Question(1, ("Which floats?\nA. iron\nB. wood\nAnswer:",) * 2, (" A", " B"), 1),
    ),
    "mmlu by letters": (
        {"question": "q", "choices": ["a", "b", "c"], "answer": "C"},
        Question(1, ("q\nA. a\nB. b\nC. c\nAnswer:",) * 3, (" A", " B", " C"), 2),
    ),
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man is [header] up.",
            "ctx_b": "he",
            "ctx": "unused",
            "endings": ["falls [step] down. [title] Ends", "  sings."],
            "label": "1",
        },
        Question(1, ("Roof: A man is up. He",) * 2, (" falls down.. Ends", " sings."), 1),
    ),
    "hellaswag's ctx alone": (
        {"ctx": "A man", "endings": ["falls.", "sings."], "label": 0},
        Question(1, ("A man",) * 2, (" falls.", " sings."), 0),
    ),
    "piqa": (
        {"goal": "Cut", "sol1": "a knife", "sol2": "a spoon", "label": 0},
        Question(1, ("Question: Cut\nAnswer:",) * 2, (" a knife", " a spoon"), 0),
    ),
    "winogrande": (
        {"sentence": "The cup was on _ because it fell.", "option1": "wood", "option2": "air", "answer": "2"},
        Question(1, ("The cup was on wood", "The cup was on air"), (" because it fell.",) * 2, 1),
    ),
    "samples": (
        {
            "doc": {},
            "target": "1",
            "arguments": {
                "gen_args_0": {"arg_0": "shot\n\nq", "arg_1": " a"},
                "gen_args_1": {"arg_0": "shot\n\nq", "arg_1": " b"},
            },
        },
        Question(1, ("shot\n\nq",) * 2, (" a", " b"), 1),
    ),
    "samples whose target is a text": (
        {"target": "b", "arguments": [["q", " a"], ["q", " b"]]},
        Question(1, ("q", "q"), (" a", " b"), 1),
    ),
    "samples of winogrande": (
        {
            "doc": {"sentence": "It is _ now.", "option1": "up", "option2": "down", "answer": "2"},
            "target": "now.",
            "arguments": [["It is up", " now."], ["It is down", " now."]],
        },
        Question(1, ("It is up", "It is down"), (" now.",) * 2, 1),
    ),
}


def write(path, *lines: str):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_the_requests_of_lm_eval(tmp_path, name):
    row, expected = ROWS[name]
    assert read_questions(write(tmp_path / "task.jsonl", json.dumps(row))) == [expected]


def test_forms_mix_and_empty_lines_do_not_count_but_are_numbered(tmp_path):
    rows = [json.dumps(row) for row, _ in ROWS.values()]
    found = read_questions(write(tmp_path / "task.jsonl", rows[0], "", *rows[1:]))
    assert [question.line for question in found] == [1, *range(3, len(rows) + 2)]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    row, expected = ROWS["processed"]
    (tmp_path / "task.jsonl").write_text(json.dumps(row), encoding="utf-8-sig")
    assert read_questions(tmp_path / "task.jsonl") == [expected]


GOOD = json.dumps(ROWS["processed"][0])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["line 2", "expected JSON"]),
        ("[1]", ["line 2", "expected a question with the fields", "found list"]),
        ('{"text": "a"}', ["line 2", "such as question, choices and answer", "found text"]),
        ('{"question": "q", "choices": ["a", "b"], "answer": "D"}', ["line 2", "one of A, B or its place", "'D'"]),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', ["line 2", "from 0 to 1, found 2"]),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', ["line 2", "from 0 to 1, found 2"]),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', ["line 2", "from 0 to 1, found -1"]),
        ('{"query": "q", "choices": ["a", "b"], "gold": "b"}', ["line 2", "gold as a number, found 'b'"]),
        ('{"query": "q", "choices": ["a"], "gold": 0}', ["line 2", "two choices or more, found 1"]),
        ('{"query": "q", "choices": [1, 2], "gold": 0}', ["line 2", "choices as a list of texts"]),
        ('{"query": 1, "choices": ["a", "b"], "gold": 0}', ["line 2", "query as text, found 1"]),
        ('{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}', ["A, B", "'C'"]),
        ('{"question": "q", "choices": ["a", "b"], "answerKey": "A"}', ["line 2", "choices with text and label"]),
        ('{"ctx": "c", "endings": ["a", "b"], "label": ""}', ["line 2", "label as a number, found ''"]),
        ('{"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}', ["line 2", "a sentence with a _"]),
        ('{"sentence": "a _", "option1": "a", "option2": "b", "answer": "3"}', ["line 2", "answer 1 or 2, found '3'"]),
        ('{"target": 0, "arguments": [["q", {"until": []}]]}', ["line 2", "pairs of a context and a continuation"]),
        ('{"target": 0, "arguments": []}', ["line 2", "two choices or more, found 0"]),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, parts):
    with pytest.raises(UserError) as error:
        read_questions(write(tmp_path / "task.jsonl", GOOD, line, GOOD))
    for part in parts:
        assert part in str(error.value)


def test_files_that_hold_no_questions(tmp_path):
    with pytest.raises(UserError, match="expected a JSONL file of questions, found nothing"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="found a directory"):
        read_questions(tmp_path)
    with pytest.raises(UserError, match="expected a question per line, found none"):
        read_questions(write(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="expected JSONL in UTF-8"):
        read_questions(tmp_path / "binary.jsonl")


def test_scores_are_those_of_the_rule():
    questions = [
        Question(1, ("q",) * 2, (" a", " bbbb"), 1),  # the likeliest is a, per character bbbb
        Question(2, ("q",) * 3, (" a", " b", " c"), 0),  # equal: the first counts
    ]
    found = score(questions, [-1.0, -2.0, -3.0, -3.0, -3.0])
    assert (found.accuracy, found.normalised) == (0.5, 1.0)
    first = -2.0 - math.log(math.exp(-1.0) + math.exp(-2.0))
    assert found.log_probability == pytest.approx((first + math.log(1 / 3)) / 2)


def test_scores_do_not_overflow():
    questions = [Question(1, ("q",) * 2, (" a", " b"), 1)]
    assert score(questions, [-1e4, -2e4]).log_probability == pytest.approx(-1e4)
