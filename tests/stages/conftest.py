"""A small corpus that the tests of the stage share: 300 documents, every third of them twice."""

from pathlib import Path

import pytest

from pipelines.config import SourceConfig
from tests.stages.corpora import make
from tests.text.conftest import make_documents, write_jsonl


@pytest.fixture(scope="session")
def documents() -> list[str]:
    unique = make_documents(300)
    return unique + unique[::3]  # every third twice


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> SourceConfig:
    return SourceConfig(path=str(write_jsonl(tmp_path_factory.mktemp("source") / "d.jsonl", documents)))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, jsonl: SourceConfig) -> Path:
    directory = tmp_path_factory.mktemp("made") / "corpus"
    make(directory, [jsonl])
    return directory
