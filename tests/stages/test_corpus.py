"""The corpus stage as a whole: what it writes, the same for any number of workers, and what it says about bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from pipelines.artifacts import StageContext
from pipelines.config import Config, SourceConfig, SourceKind, TeacherMode, UserError
from pipelines.stages import corpus
from pipelines.text import chunks, indexed, sources, tokenizer
from pipelines.text.splitting import SPLITS
from tests.text.conftest import make_documents, write_jsonl

FRACTIONS = {"validation_fraction": 0.1, "test_fraction": 0.1, "calibration_fraction": 0.1}


def make(directory: Path, inputs: list[SourceConfig], vocab_size: int = 600, **data: Any) -> dict[str, Any]:
    config = Config()
    config.model.shape.vocab_size = vocab_size
    config.data.sources = inputs
    for key, value in ({"workers": 1} | FRACTIONS | data).items():
        setattr(config.data, key, value)
    directory.mkdir(parents=True, exist_ok=True)
    return corpus.run(StageContext(config, "corpus", directory))


def read(directory: Path, split: str, number: int = 0) -> list[list[int]]:
    """The ids of every document of one prefix of a split."""
    blend = json.loads((directory / "blend.json").read_text())
    prefix = directory / blend["splits"][split][number]["prefix"]
    index = indexed.read_index(prefix)
    ids, size = indexed.read_ids(prefix, index), index.id_type.itemsize
    return [ids[p // size : p // size + n].tolist() for p, n in zip(index.pointers, index.lengths, strict=True)]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    unique = make_documents(300)
    return unique + unique[::3]  # every third twice


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> SourceConfig:
    return SourceConfig(path=str(write_jsonl(tmp_path_factory.mktemp("source") / "d.jsonl", documents)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, jsonl: SourceConfig) -> Path:
    directory = tmp_path_factory.mktemp("made") / "corpus"
    make(directory, [jsonl])
    return directory


def test_every_document_comes_back_once_on_its_side(made, documents):
    opened = tokenizer.load(made / "tokenizer")
    blend = json.loads((made / "blend.json").read_text())
    counts = json.loads((made / "counts.json").read_text())
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        every = read(made, split)
        assert all(ids[-1] == blend["eod"] and blend["eod"] not in ids[:-1] for ids in every)
        found[split] = [opened.decode(ids) for ids in every]
        count = counts["splits"][split]
        assert count["documents"] == len(every) and count["tokens"] == sum(map(len, every))
        assert count["bytes"] == sum(len(text.encode()) for text in found[split])
        assert count["bytes_per_token"] == count["bytes"] / count["tokens"]
        assert count["sources"]["00_d_jsonl"]["tokens"] == count["tokens"]
        assert [part["weight"] for part in blend["splits"][split]] == [1.0]
    assert sorted(text for texts in found.values() for text in texts) == sorted(documents)
    for one in SPLITS:  # equal documents are on one side
        for other in SPLITS[SPLITS.index(one) + 1 :]:
            assert not set(found[one]) & set(found[other])
    order = {text: n for n, text in reversed(list(enumerate(documents)))}
    first = [order[text] for text in dict.fromkeys(found["train"])]
    assert first == sorted(first)  # the order of the source
    table = numpy.load(made / blend["token_bytes"])
    assert sum(table[ids].sum() for ids in read(made, "test")) == counts["splits"]["test"]["bytes"]


def test_unigram_entropy(made):
    ids = numpy.concatenate(read(made, "train"))
    shares = numpy.unique(ids, return_counts=True)[1] / len(ids)
    entropy = json.loads((made / "counts.json").read_text())["unigram_entropy"]
    assert entropy == pytest.approx(-(shares * numpy.log(shares)).sum(), rel=1e-12)
    assert 1 < entropy < numpy.log(600)


def test_the_tokenizer_has_seen_the_train_split_alone(tmp_path, made):
    texts = [tokenizer.load(made / "tokenizer").decode(ids) for ids in read(made, "train")]
    tokenizer.train(iter(texts), 600, tmp_path / "t")
    assert (tmp_path / "t" / "tokenizer.json").read_bytes() == (made / "tokenizer" / "tokenizer.json").read_bytes()


def test_same_bytes_with_one_and_two_workers_and_other_chunks(tmp_path, monkeypatch, jsonl, made):
    for module in (chunks, sources):
        monkeypatch.setattr(module, "CHUNK", 3000)
    make(tmp_path / "two", [jsonl], workers=2)
    assert contents(tmp_path / "two") == contents(made)


def test_limit_takes_the_first_documents(tmp_path, monkeypatch, jsonl, documents):
    limited = SourceConfig(path=jsonl.path, limit_bytes=20_000)
    make(tmp_path / "a", [limited])
    monkeypatch.setattr(sources, "CHUNK", 1000)
    make(tmp_path / "b", [limited])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    splits = json.loads((tmp_path / "a" / "counts.json").read_text())["splits"].values()
    taken = sum(count["documents"] for count in splits)
    sizes = numpy.cumsum([len(text.encode()) for text in documents])
    assert sizes[taken - 2] < 20_000 <= sizes[taken - 1]


def test_weights_and_several_sources(tmp_path, jsonl):
    other = write_jsonl(tmp_path / "other.jsonl", make_documents(100, seed=9), key="body")
    few = write_jsonl(tmp_path / "few.jsonl", ["a single document"])
    inputs = [
        SourceConfig(path=jsonl.path, weight=3),
        SourceConfig(path=str(other), text_key="body"),
        SourceConfig(path=str(few), weight=4),
    ]
    make(tmp_path / "c", inputs)
    blend = json.loads((tmp_path / "c" / "blend.json").read_text())["splits"]
    weights = {split: [(part["prefix"], part["weight"]) for part in blend[split]] for split in SPLITS}
    where = next(split for split in SPLITS if len(weights[split]) == 3)
    names = ["00_d_jsonl", "01_other_jsonl", "02_few_jsonl"]
    for split in SPLITS:  # weights of what is there
        shares = [0.375, 0.125, 0.5] if split == where else [0.75, 0.25]
        assert weights[split] == [(f"data/{split}/{n}", pytest.approx(w)) for n, w in zip(names, shares, strict=False)]
    # the entropy is that of the weighted blend
    shares = numpy.zeros(600)
    for number, part in enumerate(blend["train"]):
        ids = numpy.concatenate(read(tmp_path / "c", "train", number))
        shares += part["weight"] * numpy.bincount(ids, minlength=600) / len(ids)
    shares = shares[shares > 0]
    entropy = json.loads((tmp_path / "c" / "counts.json").read_text())["unigram_entropy"]
    assert entropy == pytest.approx(-(shares * numpy.log(shares)).sum())


def existing(prefix: Path, ids: list[list[int]], kind: Any = numpy.int32) -> str:
    writer = indexed.Writer(prefix, numpy.dtype(kind))
    for document in ids:
        writer.add(numpy.array(document), numpy.array([len(document)], numpy.int32))
    writer.finish()
    return str(prefix)


@pytest.mark.parametrize("workers", [1, 2])
def test_existing_data_sets_are_split_without_a_copy(tmp_path, made, workers):
    blend = json.loads((made / "blend.json").read_text())
    ids = [document for split in SPLITS for document in read(made, split)]
    inputs = [
        SourceConfig(path=existing(tmp_path / "one", ids), weight=1),
        SourceConfig(path=existing(tmp_path / "two", ids[::-1], numpy.uint16) + ".bin", weight=3),
    ]
    make(tmp_path / "c", inputs, tokenizer=str(made / "tokenizer"), workers=workers)
    again = json.loads((tmp_path / "c" / "blend.json").read_text())
    assert again["eod"] == blend["eod"] and [p["weight"] for p in again["splits"]["train"]] == [0.25, 0.75]
    found = {split: read(tmp_path / "c", split) for split in SPLITS}
    assert sorted(d for split in SPLITS for d in found[split]) == sorted(ids)
    for split in SPLITS:
        assert sorted(found[split]) == sorted(read(tmp_path / "c", split, 1))  # the same side in both
        assert [d for d in ids if d in found[split]] == found[split]
        assert (tmp_path / "c" / "data" / split / "00_one.bin").resolve() == tmp_path / "one.bin"
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())["splits"]
    before = json.loads((made / "counts.json").read_text())["splits"]
    for key in ("documents", "tokens", "bytes"):
        assert sum(counts[s]["sources"]["00_one"][key] for s in SPLITS) == sum(before[s][key] for s in SPLITS)


def test_ids_beyond_the_tokenizer_and_tokenizers_beyond_the_model_are_refused(tmp_path, jsonl, made):
    with pytest.raises(UserError, match="at most 500 ids, the vocab_size of model.shape; found 600"):
        make(tmp_path / "c", [jsonl], vocab_size=500, tokenizer=str(made / "tokenizer"))
    source = SourceConfig(path=existing(tmp_path / "d", [[5, 6]] * 10 + [[5, 128_255]]))
    with pytest.raises(UserError, match=r"d.bin, document 11: expected ids below 600.*found 128,255.*data.tokenizer"):
        make(tmp_path / "c", [source], tokenizer=str(made / "tokenizer"), validation_fraction=0)
    with pytest.raises(UserError, match="expected the tokenizer that these ids were made with.*data.tokenizer"):
        make(tmp_path / "c", [source])
    assert not (tmp_path / "c" / "blend.json").exists()


def test_a_large_vocabulary_keeps_its_ids(tmp_path, documents, jsonl, made):
    """A tokenizer with 128,256 ids, the documents' words among the last of them."""
    large = json.loads((made / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = large["model"]["vocab"]
    shift = 128_256 - 600
    large["model"]["vocab"] = {t: n + shift if n > 300 else n for t, n in vocabulary.items()}
    large["model"]["vocab"] |= {f"filler{n}": n for n in range(301, 301 + shift)}
    shutil.copytree(made / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(large))
    make(tmp_path / "c", [jsonl], vocab_size=128_256, tokenizer=str(tmp_path / "t"))
    opened = tokenizer.load(tmp_path / "t")
    ids = read(tmp_path / "c", "train")
    assert max(map(max, ids)) > 65_535 and {opened.decode(i) for i in ids} <= set(documents)
    assert indexed.read_index(tmp_path / "c" / "data" / "train" / "00_d_jsonl").id_type == numpy.int32


def test_the_teachers_tokenizer(tmp_path, jsonl, made):
    from pipelines.families import ModelShape

    teacher = tmp_path / "teacher"
    teacher.mkdir()
    shape = ModelShape(512, 64, 128, 2, 4, 2, 16).to_hugging_face()
    (teacher / "config.json").write_text(json.dumps(shape))
    config = Config()
    config.data.sources, config.model.path = [jsonl], str(teacher)
    for key, value in ({"workers": 1} | FRACTIONS).items():
        setattr(config.data, key, value)
    directory = tmp_path / "c"
    directory.mkdir()
    context = StageContext(config, "corpus", directory)
    with pytest.raises(UserError, match="expected the teacher's tokenizer.*found none.*data.tokenizer"):
        corpus.run(context)
    shutil.copytree(made / "tokenizer", teacher, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"at most 512 ids, the vocab_size of .*teacher; found 600"):
        corpus.run(context)
    (teacher / "config.json").write_text(json.dumps(shape | {"vocab_size": 600}))
    corpus.run(context)
    assert (directory / "tokenizer" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    config.teacher.mode, config.model.shape.vocab_size = (
        TeacherMode.pretrain,
        300,
    )  # from model.shape: its own tokenizer
    corpus.run(context)
    assert json.loads((directory / "blend.json").read_text())["vocab_size"] == 300


def test_empty_splits_and_sources(tmp_path, jsonl):
    few = str(write_jsonl(tmp_path / "few.jsonl", make_documents(30)))
    with pytest.raises(UserError, match=r"the test split, found none: 30 documents.*data.test_fraction=1e-06.*=0.13"):
        make(tmp_path / "c", [SourceConfig(path=few)], test_fraction=1e-6)
    make(tmp_path / "c", [SourceConfig(path=few)], test_fraction=0.0, validation_fraction=0.2)  # none wanted
    assert json.loads((tmp_path / "c" / "blend.json").read_text())["splits"]["test"] == []
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(UserError, match="found only empty documents"):
        make(tmp_path / "d", [SourceConfig(path=str(tmp_path / "empty.jsonl"))])
    for bad, message in (
        (SourceConfig(path=few, weight=0), r"data.sources\[1\].weight: expected a number above 0, found 0"),
        (SourceConfig(path=few, limit_bytes=0), r"data.sources\[1\].limit_bytes: expected"),
        (SourceConfig(path=few, kind=SourceKind.megatron, limit_bytes=5), "neither limit_bytes nor document_bytes"),
        (SourceConfig(path=few, text_key="body"), "few.jsonl, line 1: expected a string under the key 'body'"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "e", [jsonl, bad])
        assert not list((tmp_path / "e").iterdir())  # found before any work
    with pytest.raises(UserError, match="data.workers: expected 1 or more, found 0"):
        make(tmp_path / "e", [jsonl], workers=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_deep_inside(tmp_path, monkeypatch, documents, workers):
    monkeypatch.setattr(sources, "CHUNK", 20_000)
    path = write_jsonl(tmp_path / "d.jsonl", documents * 5)
    with path.open("a") as file:
        file.write("{oops\n")
    started = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=f"d.jsonl, line {len(documents) * 5 + 1}: expected a JSON object"):
        make(tmp_path / "c", [SourceConfig(path=str(path))], workers=workers, tokenizer_sample_bytes=10_000)
    assert started == ["d.jsonl"] and sorted(p.name for p in (tmp_path / "c").iterdir()) == ["tokenizer"]


def test_a_full_disk_leaves_no_half_corpus(tmp_path, jsonl, made):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = tmp_path / "runs" / "teacher.txt"
    other.parent.mkdir()
    other.write_text("earlier output")
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # the train split is larger, nothing else
    try:
        with pytest.raises(UserError) as error:
            make(tmp_path / "runs" / "corpus", [jsonl], tokenizer=str(made / "tokenizer"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and "run.directory" in str(error.value), error.value
    assert other.read_text() == "earlier output"
    left = [p.name for p in (tmp_path / "runs" / "corpus").rglob("*") if p.is_file()]
    assert "blend.json" not in left and not [name for name in left if name.endswith((".bin", ".idx", ".lengths"))]


def test_killed_and_started_again(tmp_path, jsonl, made):
    """kill -9 while writing: nothing is taken for whole, no worker lives on, and a rerun gives the corpus."""
    script = tmp_path / "stage.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, time
            from pathlib import Path
            from tests.stages import test_corpus
            from pipelines.config import SourceConfig
            from pipelines.text import writing

            class Slow(writing.indexed.Writer):
                def add(self, ids, lengths):
                    super().add(ids, lengths)
                    Path({str(tmp_path / "writing")!r}).touch()
                    time.sleep(60)

            if __name__ == "__main__":
                writing.indexed.Writer = Slow
                test_corpus.make(Path({str(tmp_path / "c")!r}), [SourceConfig(path={jsonl.path!r})], workers=2)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    while not (tmp_path / "writing").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c" / "blend.json").exists() and not (tmp_path / "c" / "data").exists()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)
    make(tmp_path / "c", [jsonl])
    assert contents(tmp_path / "c") == contents(made)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_standard_library_and_no_torch(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from tests.stages import test_corpus
            from pipelines.config import SourceConfig

            if __name__ == "__main__":
                source = SourceConfig(limit_bytes=500_000)
                figures = test_corpus.make(Path({str(tmp_path / "c")!r}), [source], test_fraction=0.2)
                assert figures["splits"]["train"]["tokens"] > 50_000, figures
                assert "torch" not in sys.modules
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, str(script)], env=environment, check=True)
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())
    assert counts["sources"]["00_standard_library"]["kind"] == "standard_library"
    assert 500_000 <= sum(count["bytes"] for count in counts["splits"].values()) < 700_000


def test_gpt_dataset_reads_the_blend(tmp_path, jsonl, made):
    """Megatron's own GPTDataset, as NeMo's PreTrainingDataModule builds it, over written and over linked data sets."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    every = [d for split in SPLITS for d in read(made, split)]
    inputs = [jsonl, SourceConfig(path=existing(tmp_path / "one", every), weight=3)]
    make(tmp_path / "c", inputs, tokenizer=str(made / "tokenizer"))
    blend = json.loads((tmp_path / "c" / "blend.json").read_text())

    class Eod:
        eod = blend["eod"]
        unique_identifiers: dict[str, Any] = {}

    def paths(split: str) -> Any:
        parts = blend["splits"][split]
        return get_blend_from_list([x for p in parts for x in (str(p["weight"]), str(tmp_path / "c" / p["prefix"]))])

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend_per_split=[paths("train"), paths("validation"), paths("test")],
        path_to_cache=None,
        tokenizer=Eod(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [200, 20, 20], lambda: True, config).build()
    assert len(train) >= 200
    assert numpy.bincount(train.dataset_index[:200]).tolist() == [50, 150]
    streams = [numpy.array([i for d in read(tmp_path / "c", "train", n) for i in d]) for n in (0, 1)]
    known = [{tuple(d) for d in read(tmp_path / "c", "train", n)} for n in (0, 1)]
    for number in range(200):
        sample, source = train[number]["tokens"].tolist(), int(train.dataset_index[number])
        assert all(0 <= i < 600 for i in sample) and len(streams[source])
        inner = [i for i, token in enumerate(sample) if token == Eod.eod]
        for first, last in zip(inner, inner[1:], strict=False):  # whole documents between two ends
            assert tuple(sample[first + 1 : last + 1]) in known[source]
