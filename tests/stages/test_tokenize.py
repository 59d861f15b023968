"""A corpus in parts: what the parts hold together is what one process makes, and a part does nothing twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import StageContext, stage_directory
from pipelines.compose import compose
from pipelines.config import Config, SourceConfig, SourceKind, UserError
from pipelines.stages import corpus, tokenize
from pipelines.text import parts
from pipelines.text.splitting import SPLITS
from pipelines.validation import validate
from tests.stages.corpora import FRACTIONS, make, read
from tests.text.conftest import make_documents, write_jsonl


@pytest.fixture
def inputs(tmp_path: Path) -> list[SourceConfig]:
    """A directory of five files, one of them without a document for every split, and a source of one file."""
    (tmp_path / "many").mkdir()
    for number, size in enumerate((60, 45, 2, 80, 30)):
        write_jsonl(tmp_path / "many" / f"{number}.jsonl", make_documents(size, seed=number))
    one = write_jsonl(tmp_path / "one.jsonl", make_documents(50, seed=9), key="body")
    return [SourceConfig(path=str(tmp_path / "many"), weight=3), SourceConfig(path=str(one), text_key="body")]


@pytest.fixture
def whole(tmp_path: Path, inputs: list[SourceConfig]) -> Path:
    """The corpus of one process, and its tokenizer."""
    make(tmp_path / "whole", inputs)
    return tmp_path / "whole"


def config_of(tmp_path: Path, inputs: list[SourceConfig], whole: Path, **data: Any) -> Config:
    config = Config()
    config.run.directory = str(tmp_path / "runs")
    config.model.shape.vocab_size = 600
    config.data.sources, config.data.tokenizer = inputs, str(whole / "tokenizer")
    for key, value in ({"workers": 1} | FRACTIONS | data).items():
        setattr(config.data, key, value)
    return config


def run(config: Config, stage: str) -> dict[str, Any]:
    directory = stage_directory(config, stage)
    directory.mkdir(parents=True, exist_ok=True)
    return {"corpus": corpus, "tokenize": tokenize}[stage].run(StageContext(config, stage, directory))


def test_parts_are_the_corpus_of_one_process(tmp_path: Path, inputs: list[SourceConfig], whole: Path) -> None:
    done = [run(config_of(tmp_path, inputs, whole, part=part, parts=3), "tokenize") for part in (3, 1, 2)]
    assert sum(part["files"] for part in done) == 6 and min(part["files"] for part in done) >= 1
    config = config_of(tmp_path, inputs, whole, parts=3)
    figures = run(config, "corpus")
    made = stage_directory(config, "corpus")
    counted, expected = (json.loads((place / "counts.json").read_text()) for place in (made, whole))
    assert counted == expected
    assert figures["splits"]["train"]["tokens"] == sum(part["tokens"] for part in done) - sum(
        figures["splits"][split]["tokens"] for split in SPLITS[1:]
    )
    blends = [json.loads((place / "blend.json").read_text())["splits"] for place in (made, whole)]
    for split in SPLITS:
        found: dict[str, list[list[int]]] = {}
        weights: dict[str, float] = {}
        for number, entry in enumerate(blends[0][split]):
            source = Path(entry["prefix"]).name.rpartition("_")[0]
            found.setdefault(source, []).extend(read(made, split, number))
            weights[source] = weights.get(source, 0) + entry["weight"]
        for number, entry in enumerate(blends[1][split]):
            source = Path(entry["prefix"]).name
            assert found.pop(source) == read(whole, split, number), "the same documents in the same order"
            assert weights[source] == pytest.approx(entry["weight"])
        assert not found
    assert (made / "token_bytes.npy").read_bytes() == (whole / "token_bytes.npy").read_bytes()


def test_a_part_does_what_is_left(tmp_path: Path, inputs: list[SourceConfig], whole: Path, monkeypatch: Any) -> None:
    config = config_of(tmp_path, inputs, whole, part=1, parts=1)
    real, begun = parts.write_source, []

    def cut_short(*arguments: Any) -> None:
        begun.append(arguments)
        if len(begun) == 4:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(parts, "write_source", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(config, "tokenize")
    directory = stage_directory(config, "tokenize")
    assert len(list(directory.glob("*/*/part.json"))) == 3, "whole files, and nothing of the fourth"
    assert not list(directory.glob("*/*.partial"))
    assert run(config, "tokenize")["tokenized"] == 3
    assert run(config, "tokenize")["tokenized"] == 0
    again = config_of(tmp_path, inputs, whole, part=2, parts=2)
    assert run(again, "tokenize")["tokenized"] == 0, "whatever the number of parts"
    write_jsonl(tmp_path / "many" / "3.jsonl", make_documents(81, seed=3))
    assert run(config, "tokenize")["tokenized"] == 1, "a file that has changed"
    config.data.test_fraction = 0.2
    assert run(config, "tokenize")["tokenized"] == 6, "another split"


def test_what_is_missing_is_named(tmp_path: Path, inputs: list[SourceConfig], whole: Path) -> None:
    run(config_of(tmp_path, inputs, whole, part=1, parts=2), "tokenize")
    with pytest.raises(UserError, match=r"every one of 6 files tokenized .* found \d that are not: .*\.jsonl"):
        run(config_of(tmp_path, inputs, whole, parts=2), "corpus")


def test_shares_are_even_and_disjoint(tmp_path: Path, inputs: list[SourceConfig], whole: Path) -> None:
    files = parts.files_of(config_of(tmp_path, inputs, whole).data)
    shares = [parts.share(files, part, 3) for part in (1, 2, 3)]
    assert sorted(file.name for share in shares for file in share) == sorted(file.name for file in files)
    loads = [sum(file.path.stat().st_size for file in share) for share in shares]
    assert max(loads) - min(loads) <= max(file.path.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("stages", "overrides", "words"),
    [
        (["tokenize"], [], ["data.parts", "the number of parts"]),
        (["tokenize"], ["data.parts=4"], ["data.part", "from 1 to data.parts=4"]),
        (["tokenize"], ["data.parts=4", "data.part=5"], ["data.part", "at most data.parts=4", "5"]),
        (["corpus"], ["data.part=1"], ["data.part", "stage=tokenize"]),
        (["corpus"], ["data.parts=4"], ["data.parts", "a tokenizer that is given"]),
    ],
)
def test_settings_that_make_no_parts_are_refused(stages: list[str], overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", *overrides]), stages)
    assert all(word in str(caught.value) for word in words), caught.value


def test_sources_without_files_of_documents_are_refused(
    tmp_path: Path, inputs: list[SourceConfig], whole: Path
) -> None:
    for source in (SourceConfig(kind=SourceKind.standard_library), SourceConfig(path=inputs[1].path, limit_bytes=10)):
        config = config_of(tmp_path, [source], whole)
        with pytest.raises(UserError, match="files of kind jsonl or parquet, without limit_bytes"):
            parts.files_of(config.data)
