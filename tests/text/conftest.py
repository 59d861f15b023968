"""Small corpora: a few hundred documents of seeded words, and a tokenizer trained on them."""

import json
import random
from pathlib import Path

import pytest

from pipelines.text import tokenizer

WORDS = [
    "".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyzäöü", k=random.Random(-n).randint(1, 9)))
    for n in range(400)
]


def make_documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + f"\n{n}" for n in range(count)]


def write_jsonl(path: Path, documents: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text, "id": n}) + "\n" for n, text in enumerate(documents)))
    return path


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "tokenizer"
    tokenizer.train(iter(documents), 600, directory)
    return directory
