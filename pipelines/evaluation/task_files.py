"""Two sets of questions made from held-out text, as task files of lm-evaluation-harness: no download, any language.

corpus_choice: a passage and four continuations of it, of which one is its own and three are taken from other places of
the split, all of as many characters. corpus_cloze: a passage up to the last word of a line, and that word, in the
manner of LAMBADA (arXiv 1606.06031): accuracy is the share of words that the model's likeliest ids make, perplexity is
per word.

Only documents of the evaluated split are read. A document's side of the corpus is decided by its content
(text/splitting.py), so that none of them is in the text that models were trained on. The same corpus and seed give the
same files. Imports no torch.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import files
from pipelines.config import UserError
from pipelines.evaluation_settings import CHOICE, CLOZE
from pipelines.text import indexed, tokenizer
from pipelines.vocabulary import read_blend

CHOICES = 4
CONTEXT, LEAST_CONTEXT, CONTINUATION = 256, 40, 48  # characters
PASSAGE = 4096  # ids of a document that are decoded at a time
LEAST_WORDS = 5  # of a line whose last one is asked for
ATTEMPTS = 20  # passages that are tried for each question
_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
_LINE = re.compile(r"[^\n]*\S[^\n]*")

_TASKS: dict[str, dict[str, Any]] = {
    CHOICE: {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    CLOZE: {
        "output_type": "loglikelihood",
        "doc_to_text": "query",
        "doc_to_target": "word",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


@dataclass(frozen=True)
class Passage:
    """A piece of a held-out document. place: data set and number of the document; ends: reaches the document's end."""

    place: str
    text: str
    ends: bool


def write(corpus: Path, split: str, name: str, directory: Path, *, questions: int, seed: int) -> Path:
    """<directory>/<name>.yaml and .jsonl with at most so many questions; the path of the first.

    Raises UserError where the split has not enough text for one question.
    """
    passages = HeldOut(corpus, split, random.Random(f"{seed} {name}"))
    rows: list[dict[str, Any]] = []
    made: Callable[[HeldOut], dict[str, Any] | None] = {CHOICE: _choice, CLOZE: _cloze}[name]
    known = set()
    for _ in range(questions * ATTEMPTS):
        row = made(passages)
        if row is not None and row["query"] not in known:
            known.add(row["query"])
            rows.append(row)
            if len(rows) == questions:
                break
    if not rows:
        raise UserError(
            f"{name}: expected documents of {LEAST_CONTEXT + CONTINUATION} characters or more with words in the split "
            f"{split!r} of {corpus}, found none. Make the corpus of longer documents, or leave {name} out of "
            "evaluate.tasks.names."
        )
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / f"{name}.jsonl"
    files.write_atomic(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        **_TASKS[name],
        "metadata": {"version": 1.0},
    }
    files.write_atomic(directory / f"{name}.yaml", json.dumps(task, indent=2) + "\n")  # JSON is YAML
    return directory / f"{name}.yaml"


def prompts(corpus: Path, split: str, count: int, numbers: random.Random) -> list[str]:
    """At most so many beginnings of text to be continued, of at most CONTEXT characters each. Raises UserError."""
    passages, found = HeldOut(corpus, split, numbers), dict[str, None]()
    for _ in range(count * ATTEMPTS):
        text = passages.next().text
        place = _place(numbers, text, LEAST_CONTEXT)
        if place is not None:
            found[_before(text, place)] = None
        if len(found) == count:
            break
    if not found:
        raise UserError(
            f"evaluate.generation: expected documents of {LEAST_CONTEXT + CONTINUATION} characters or more with words "
            f"in the split {split!r} of {corpus}, found none. Give a file with evaluate.generation.prompts."
        )
    return list(found)


class HeldOut:
    """Passages of a split's documents in an order that the random numbers give, document after document, for ever."""

    def __init__(self, corpus: Path, split: str, numbers: random.Random) -> None:
        blend = read_blend(corpus)
        parts = blend["splits"].get(split) or []
        if not (corpus / "tokenizer" / "tokenizer.json").is_file():
            raise UserError(
                f"{corpus}: expected its tokenizer in tokenizer/tokenizer.json, found none. Make the corpus with "
                "stage=corpus and data.tokenizer, or leave out what is made from held-out text."
            )
        self.numbers = numbers
        self._tokenizer = tokenizer.load(corpus / "tokenizer")
        self._end = blend.get("eod")
        self._sets = [(part["prefix"], indexed.read_index(corpus / part["prefix"])) for part in parts]
        self._ids = [indexed.read_ids(corpus / prefix, index) for prefix, index in self._sets]
        self._counts = [index.document_count for _, index in self._sets]
        self._first = list(itertools.accumulate(self._counts, initial=0))[:-1]
        self.documents = sum(self._counts)
        if not self.documents:
            raise UserError(
                f"{corpus}: expected documents in the split {split!r}, found none. Make the corpus with "
                f"data.{split}_fraction above 0."
            )
        self._order = self._places()

    def next(self) -> Passage:
        return self._passage(next(self._order))

    def _places(self) -> Iterator[int]:
        while True:
            yield from self.numbers.sample(range(self.documents), self.documents)

    def _passage(self, number: int) -> Passage:
        place = next(place for place, first in enumerate(self._first) if number < first + self._counts[place])
        (prefix, index), ids, number = self._sets[place], self._ids[place], number - self._first[place]
        size, found = index.id_type.itemsize, []
        for sequence in range(int(index.documents[number]), int(index.documents[number + 1])):
            start = int(index.pointers[sequence]) // size
            found += [int(i) for i in ids[start : start + int(index.lengths[sequence])] if i != self._end]
        begin = self.numbers.randrange(max(1, len(found) - PASSAGE + 1))
        text = self._tokenizer.decode(found[begin : begin + PASSAGE], skip_special_tokens=False)
        # A character whose bytes are in two passages is in neither.
        return Passage(f"{prefix} {number}", text.strip("\ufffd"), begin + PASSAGE >= len(found))


def _choice(held_out: HeldOut) -> dict[str, Any] | None:
    passage = held_out.next()
    place = _place(held_out.numbers, passage.text, LEAST_CONTEXT)
    if place is None:
        return None
    choices = [passage.text[place + 1 : place + 1 + CONTINUATION]]
    for _ in range(ATTEMPTS):
        other = held_out.next()
        if other.place == passage.place and held_out.documents > 1:
            continue
        found = _place(held_out.numbers, other.text, 1)
        if found is not None and (text := other.text[found + 1 : found + 1 + CONTINUATION]) not in choices:
            choices.append(text)
        if len(choices) == CHOICES:
            break
    else:
        return None
    order = held_out.numbers.sample(range(CHOICES), CHOICES)
    return {
        "query": _before(passage.text, place),
        "choices": [choices[number] for number in order],
        "gold": order.index(0),
        "document": passage.place,
    }


def _place(numbers: random.Random, text: str, least: int) -> int | None:
    """Of a single space between two words, with so many characters before it and a continuation behind it."""
    places = [m.start() for m in _BETWEEN_WORDS.finditer(text, least, max(least, len(text) - CONTINUATION))]
    return numbers.choice(places) if places else None


def _before(text: str, place: int) -> str:
    """At most CONTEXT characters of the text before a place, from the beginning of a word."""
    begin = max(0, place - CONTEXT)
    if begin:
        found = re.compile(r"\s\S").search(text, begin, place)
        begin = found.start() + 1 if found else begin
    return text[begin:place]


def _cloze(held_out: HeldOut) -> dict[str, Any] | None:
    passage = held_out.next()
    text = passage.text
    places = []
    for line in _LINE.finditer(text):
        words = line.group().rstrip()
        last = line.start() + words.rfind(" ")
        whole = line.end() < len(text) or passage.ends
        if whole and len(words.split()) >= LEAST_WORDS and _BETWEEN_WORDS.match(text, last) and last >= LEAST_CONTEXT:
            places.append((last, line.start() + len(words)))
    if not places:
        return None
    place, end = held_out.numbers.choice(places)
    return {"query": _before(text, place), "word": text[place + 1 : end], "document": passage.place}
