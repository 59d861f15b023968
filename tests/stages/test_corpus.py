"""The corpus stage as a whole: what it writes, the same for any number of workers."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy
import pytest

from pipelines import artifacts, index_header, storage
from pipelines.artifacts import StageContext
from pipelines.compose import compose
from pipelines.config import Config, SourceConfig, TeacherMode, UserError
from pipelines.families import ModelShape
from pipelines.stages import STAGES, corpus
from pipelines.text import chunks, indexed, sources, tokenizer
from pipelines.text.splitting import SPLITS
from pipelines.validation import validate
from tests.stages.corpora import FRACTIONS, contents, existing, make, read
from tests.text.conftest import make_documents, write_jsonl

SHAPE = ModelShape(600, 64, 128, 2, 4, 4, 16)


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


def test_the_plan_tells_the_bytes_of_a_corpus_that_is_made_and_of_one_that_pruning_needs(made):
    def disk(run: str, samples: int = 1) -> dict[str, Any]:
        settings = [f"run.directory={made.parent.parent}", f"run.name={run}", "teacher=take", "distil.steps=1"]
        settings += [f"data.{name}={value}" for name, value in FRACTIONS.items()]
        settings += ["student.hidden_size=32", "prune.sequence_length=8", f"prune.calibration_samples={samples}"]
        return storage.run_bytes(compose(settings), SHAPE, SHAPE)

    found, files = disk(made.parent.name), [*made.glob("data/*/*.bin"), *made.glob("data/*/*.idx")]
    heads = 4 * (index_header.START + 8)  # of each split, with where its last document ends
    assert found["corpus"] == sum(file.stat().st_size for file in files) - heads and found["corpus_is_counted"]
    scored = json.loads((made / "counts.json").read_text())["splits"]["calibration"]["tokens"] // 8
    needed = disk("another", scored)
    assert not needed["corpus_is_counted"] and needed["corpus"] == 2 * needed["corpus_tokens"]
    assert needed["corpus_tokens"] == pytest.approx(found["corpus_tokens"], rel=0.3), "but for the luck of the split"


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
        assert found[split] == read(made, split)  # and the side of the text they were made from
        assert (tmp_path / "c" / "data" / split / "00_one.bin").resolve() == tmp_path / "one.bin"
    counts = json.loads((tmp_path / "c" / "counts.json").read_text())["splits"]
    before = json.loads((made / "counts.json").read_text())["splits"]
    for key in ("documents", "tokens", "bytes"):
        assert sum(counts[s]["sources"]["00_one"][key] for s in SPLITS) == sum(before[s][key] for s in SPLITS)


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


def test_the_standard_library_and_no_torch(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            from tests.stages import corpora
            from pipelines.config import SourceConfig

            if __name__ == "__main__":
                source = SourceConfig(limit_bytes=500_000)
                figures = corpora.make(Path({str(tmp_path / "c")!r}), [source], test_fraction=0.2)
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


def test_patterns_and_prefixes_are_known_inputs(tmp_path, made):
    """The manifest holds the hash of every file that a pattern or a prefix names, and validation lets both through."""
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    prefixes = [existing(tmp_path / name, read(made, "train")) for name in ("ids", "ids2", "ids3")]
    config = Config()
    config.run.directory = str(tmp_path / "runs")
    names = [prefix + suffix for prefix, suffix in zip(prefixes, ("", ".bin", ".idx"), strict=True)]
    config.data.sources = [SourceConfig(path=p) for p in (f"{tmp_path}/*.txt", *names)]
    validate(config, ["corpus"])
    found = [list(entry["files"]) for entry in artifacts.inputs(config, STAGES["corpus"]).values()]
    assert found == [["a.txt"], ["b.txt"], *([f"{name}.bin", f"{name}.idx"] for name in ("ids", "ids2", "ids3"))]
    config.data.sources = [SourceConfig(path=f"{tmp_path}/*.nothing")]
    with pytest.raises(UserError, match="an existing path"):
        validate(config, ["corpus"])
