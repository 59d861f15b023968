"""Multiple-choice questions of a JSONL file, by the rules of lm-evaluation-harness. Imports no torch.

One JSON object per line, of any of these forms; all lines of a file need not be of the same:

    processed      query, choices, gold                       what lm-eval's own process_docs give
    ARC            question, choices {text, label}, answerKey
    MMLU           question, choices (a list), answer (the place of the right one from 0, or its letter)
    HellaSwag      ctx, or activity_label, ctx_a, ctx_b; endings, label
    PIQA           goal, sol1, sol2, label
    Winogrande     sentence with a _, option1, option2, answer 1 or 2
    samples        arguments, target                          a line of lm-eval's samples_<task>.jsonl (--log_samples),
                                                              with its few-shot examples

The texts are those of lm-eval's tasks of these names without examples: arc_easy, arc_challenge, hellaswag, piqa,
winogrande, and of mmlu, which shows the choices by letters and asks for the letter, without the line on its subject.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import artifacts
from pipelines.config import Config, UserError
from pipelines.families import ModelShape
from pipelines.vocabulary import check_vocabulary


@dataclass(frozen=True)
class Question:
    """One question as requests: how likely is continuations[i] after contexts[i]. gold: the right one, from 0.

    line: of its file, from 1. A choice's continuation begins with a space. Winogrande's contexts differ and its
    continuations do not: a choice is judged by what follows it.
    """

    line: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def sizes(self) -> list[int]:
        """Characters of each choice without the space before it, at least 1: what acc_norm divides by."""
        return [max(len(continuation.removeprefix(" ")), 1) for continuation in self.continuations]


@dataclass(frozen=True)
class Row:
    """ids: of a context and its continuation, the last `continuation` of which are the continuation's; one before
    them is the context's at least. A model reads all but the last."""

    ids: tuple[int, ...]
    continuation: int


@dataclass(frozen=True)
class TaskScore:
    """Means over the questions.

    accuracy: share whose likeliest choice is the right one (lm-eval's acc); normalised: likeliest per character
    (acc_norm). log_probability: of the right choice among the choices, nats: what tells two models apart whose
    accuracies are equal.
    """

    accuracy: float
    normalised: float
    log_probability: float

    def counted(self, by_character: bool) -> float:
        """The accuracy that counts: normalised or not."""
        return self.normalised if by_character else self.accuracy


def score(questions: Sequence[Question], likelihoods: Sequence[float]) -> TaskScore:
    """likelihoods: the log-likelihood in nats of every choice, one question after the other. Of equal ones the first
    is taken, as numpy's argmax does."""
    assert len(likelihoods) == sum(len(question.contexts) for question in questions)
    right, normalised, log_probability, start = 0, 0, 0.0, 0
    for question in questions:
        found = list(likelihoods[start : start + len(question.contexts)])
        start += len(found)
        per_character = [value / size for value, size in zip(found, question.sizes, strict=True)]
        right += found.index(max(found)) == question.gold
        normalised += per_character.index(max(per_character)) == question.gold
        greatest = max(found)
        total = greatest + math.log(sum(math.exp(value - greatest) for value in found))
        log_probability += found[question.gold] - total
    return TaskScore(right / len(questions), normalised / len(questions), log_probability / len(questions))


def read_questions(path: str | Path, setting: str = "prune.task") -> list[Question]:
    """Every question of the file that `setting` names. Raises UserError, with the line, for what is not one."""
    path = Path(path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing"
        raise UserError(f"{setting}={path}: expected a JSONL file of questions, found {found}. Check the path.")
    questions = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    questions.append(_question(path, number, line))
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected JSONL in UTF-8, found other bytes. Convert it.") from None
    if not questions:
        raise UserError(f"{path}: expected a question per line, found none. Give another file with {setting}.")
    return questions


def tokenizer_directory(config: Config, directory: Path, teacher: ModelShape) -> Path:
    """With the teacher's tokenizer.json: its own, or the corpus's. Raises UserError where that is another model's."""
    if (directory / "tokenizer.json").is_file():
        return directory
    corpus = artifacts.corpus_directory(config)
    found = corpus / "tokenizer"
    if not (found / "tokenizer.json").is_file():
        raise UserError(
            f"prune.task: expected a tokenizer.json in the teacher's directory {directory} or in {found}, found "
            "neither. Put the model's tokenizer there."
        )
    check_vocabulary(corpus, directory, teacher.vocab_size)
    return found


def check(config: Config, teacher: ModelShape) -> None:
    """prune.task, and its tokenizer where teacher and corpus are there already. Raises UserError."""
    read_questions(str(config.prune.task))
    directory = artifacts.teacher_directory(config)
    if artifacts.is_hugging_face(directory) and (artifacts.corpus_directory(config) / "blend.json").is_file():
        tokenizer_directory(config, directory, teacher)


def _question(path: Path, number: int, line: str) -> Question:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON, found an error: {error}. Correct the line or remove it.") from None
    forms = [(names, read) for names, read in _FORMS if isinstance(row, dict) and all(name in row for name in names)]
    if not forms:
        found = ", ".join(sorted(map(str, row))) if isinstance(row, dict) else type(row).__name__
        raise UserError(
            f"{where}: expected a question with the fields of a known form (pipelines/questions.py), such as question, "
            f"choices and answer; found {found or 'no field'}. Rename them."
        )
    try:
        contexts, continuations, gold = forms[0][1](row)
    except _Unreadable as error:
        raise UserError(f"{where}: {error}") from None
    if len(continuations) < 2:
        raise UserError(f"{where}: expected two choices or more, found {len(continuations)}. Remove the line.")
    if not 0 <= gold < len(continuations):
        raise UserError(
            f"{where}: expected the right one of {len(continuations)} choices, from 0 to {len(continuations) - 1}, "
            f"found {gold}. Correct the line or remove it."
        )
    return Question(number, tuple(contexts), tuple(continuations), gold)


class _Unreadable(Exception):
    """What was expected of a row, and found."""


_Parts = tuple[list[str], list[str], int]  # contexts, continuations, gold


def _same_context(context: str, choices: Sequence[str], gold: int) -> _Parts:
    return [context] * len(choices), [f" {choice}" for choice in choices], gold


def _processed(row: Mapping[str, Any]) -> _Parts:
    return _same_context(_text(row, "query"), _texts(row, "choices"), _number(row, "gold"))


def _arc(row: Mapping[str, Any]) -> _Parts:
    choices = row["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise _Unreadable(f"expected choices with text and label, found {choices!r}. Correct the line.")
    labels, key = [str(label) for label in choices["label"]], str(row["answerKey"])
    if key not in labels:
        raise _Unreadable(f"expected an answerKey that is one of {', '.join(labels)}, found {key!r}. Correct the line.")
    texts = _texts(choices, "text")
    if len(texts) != len(labels):
        found = f"{len(texts)} and {len(labels)}"
        raise _Unreadable(f"expected as many texts as labels of the choices, found {found}. Correct the line.")
    return _same_context(f"Question: {_text(row, 'question')}\nAnswer:", texts, labels.index(key))


def _mmlu(row: Mapping[str, Any]) -> _Parts:
    choices, answer = _texts(row, "choices"), row["answer"]
    letters = LETTERS[: len(choices)]
    if len(letters) < len(choices):
        raise _Unreadable(f"expected at most {len(LETTERS)} choices, found {len(choices)}. Leave some out.")
    letter = answer.strip().rstrip(".)").upper() if isinstance(answer, str) else ""
    if isinstance(answer, str) and not answer.strip().isdigit() and (len(letter) != 1 or letter not in letters):
        known = ", ".join(letters)
        raise _Unreadable(f"expected an answer, one of {known} or its place from 0, found {answer!r}. Correct it.")
    gold = letters.index(letter) if len(letter) == 1 and letter in letters else _number(row, "answer")
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return _same_context(f"{_text(row, 'question').strip()}{listed}\nAnswer:", letters, gold)


def _hellaswag(row: Mapping[str, Any]) -> _Parts:
    if {"activity_label", "ctx_a", "ctx_b"} <= row.keys():
        begun = f"{_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
        context = _plain(f"{_text(row, 'activity_label')}: {begun}")
    else:
        context = _plain(_text(row, "ctx"))
    return _same_context(context, [_plain(ending) for ending in _texts(row, "endings")], _number(row, "label"))


def _plain(text: str) -> str:
    """Without WikiHow's marks, as lm-eval's HellaSwag takes them out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Mapping[str, Any]) -> _Parts:
    choices = [_text(row, "sol1"), _text(row, "sol2")]
    return _same_context(f"Question: {_text(row, 'goal')}\nAnswer:", choices, _number(row, "label"))


def _winogrande(row: Mapping[str, Any]) -> _Parts:
    sentence = _text(row, "sentence")
    before, gap, after = sentence.partition("_")
    if not gap:
        raise _Unreadable(f"expected a sentence with a _ for the choice, found {sentence!r}. Correct the line.")
    answer = _number(row, "answer")
    if answer not in (1, 2):
        raise _Unreadable(f"expected answer 1 or 2, found {row['answer']!r}. Correct the line or remove it.")
    contexts = [before + _text(row, name) for name in ("option1", "option2")]
    return contexts, [f" {after.strip()}"] * 2, answer - 1


def _sample(row: Mapping[str, Any]) -> _Parts:
    arguments = row["arguments"]
    entries = list(arguments.values()) if isinstance(arguments, dict) else arguments
    pairs = [list(entry.values()) if isinstance(entry, dict) else entry for entry in entries or ()]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair) for pair in pairs):
        raise _Unreadable(
            "expected arguments that are pairs of a context and a continuation, found others. Take the samples of a "
            "multiple-choice task."
        )
    contexts, continuations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return contexts, continuations, _sample_gold(row, continuations)


def _sample_gold(row: Mapping[str, Any], continuations: list[str]) -> int:
    """target is the place of the right choice; where the choices differ in their contexts, as Winogrande's, it is the
    text that all continue with, and the document knows the place."""
    document = row.get("doc")
    if isinstance(document, dict) and all(name in document for name in _WINOGRANDE):
        return _winogrande(document)[2]
    target = row["target"]
    places = [place for place, text in enumerate(continuations) if text.strip() == str(target).strip()]
    if len(places) == 1:
        return places[0]
    return _number(row, "target")


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise _Unreadable(f"expected {name} as text, found {row[name]!r}. Correct the line or remove it.")
    return row[name]


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    value = row[name]
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise _Unreadable(f"expected {name} as a list of texts, found {value!r}. Correct the line or remove it.")
    return value


def _number(row: Mapping[str, Any], name: str) -> int:
    value = row[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    raise _Unreadable(f"expected {name} as a number, found {value!r}. Correct the line or remove it.")


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_WINOGRANDE = ("sentence", "option1", "option2", "answer")
_FORMS = (
    (("arguments", "target"), _sample),
    (("query", "choices", "gold"), _processed),
    (("question", "choices", "answerKey"), _arc),
    (("question", "choices", "answer"), _mmlu),
    (("ctx", "endings", "label"), _hellaswag),
    (("ctx_a", "ctx_b", "activity_label", "endings", "label"), _hellaswag),
    (("goal", "sol1", "sol2", "label"), _piqa),
    (_WINOGRANDE, _winogrande),
)
