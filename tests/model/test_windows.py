"""Windows over a split: every token is a label once, on whatever ranks, and the bytes behind the labels."""

import json
from pathlib import Path

import numpy
import pytest
import torch

from pipelines.config import UserError
from pipelines.model.windows import (
    Windows,
    batches,
    chosen_windows,
    end_of_document,
    mean_token_bytes,
    row_hashes,
    split_blend,
    split_prefixes,
    token_bytes,
)
from pipelines.text import indexed


def write(prefix: Path, documents: list[numpy.ndarray], vocab_size: int = 128_256) -> Path:
    writer = indexed.Writer(prefix, indexed.id_type(vocab_size))
    for document in documents:
        writer.add(document, numpy.array([len(document)], numpy.int32))
    writer.finish()
    return prefix


@pytest.fixture
def documents() -> list[numpy.ndarray]:
    rng = numpy.random.default_rng(5)
    return [rng.integers(1, 128_256, size=n) for n in rng.integers(1, 30, size=40)]


@pytest.fixture
def prefixes(tmp_path, documents) -> list[Path]:
    """The documents' stream over three data sets: written, selected from a larger one, and of narrow ids."""
    documents[30:] = [d % 1000 + 1 for d in documents[30:]]
    mixed = [d for pair in zip(documents[15:30], documents[:15], strict=True) for d in pair]
    write(tmp_path / "mixed", mixed)
    chosen = numpy.arange(30) % 2 == 0
    indexed.write_selection(tmp_path / "mixed", indexed.read_index(tmp_path / "mixed"), chosen, tmp_path / "selected")
    return [
        write(tmp_path / "first", documents[:15]),
        tmp_path / "selected",
        write(tmp_path / "narrow", documents[30:], 4096),
    ]


@pytest.mark.parametrize("length", [1, 7, 64, 10_000])
def test_every_token_but_the_first_is_a_label_once(prefixes, documents, length):
    stream = torch.from_numpy(numpy.concatenate(documents))
    windows = Windows(prefixes, length)
    assert windows.tokens == len(stream) and windows.labels == len(stream) - 1
    labels, inputs = [], []
    for number in range(len(windows)):
        window, mask = windows[number], windows.mask(number).bool()
        assert window.shape == (length + 1,) and window.dtype == torch.int64 and mask.shape == (length,)
        assert (window[1:][~mask] == 0).all()
        inputs.append(window[:-1][mask])
        labels.append(window[1:][mask])
    assert torch.equal(torch.cat(labels), stream[1:])
    assert torch.equal(torch.cat(inputs), stream[:-1])
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_batches_over_ranks_hold_all_once(prefixes, documents, data_size, micro_batch_size):
    windows = Windows(prefixes, 16)
    ranks = [list(batches(windows, micro_batch_size, rank, data_size)) for rank in range(data_size)]
    assert len({len(found) for found in ranks}) == 1
    labels = []
    for together in zip(*ranks, strict=True):
        for batch in together:
            assert all(batch[key].shape == (micro_batch_size, 16) for key in batch)
            assert batch["loss_mask"].dtype == torch.float32 and batch["tokens"].dtype == torch.int64
            assert torch.equal(batch["position_ids"], torch.arange(16).expand(micro_batch_size, 16))
            assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
            labels.append(batch["labels"][batch["loss_mask"].bool()])
    assert torch.equal(torch.cat(labels), torch.from_numpy(numpy.concatenate(documents))[1:])


def test_a_limit_spreads_the_windows(prefixes):
    windows = Windows(prefixes, 8)
    assert chosen_windows(windows, 2, 2, limit=3) == [n * len(windows) // 12 for n in range(12)]
    found = [batch for rank in range(2) for batch in batches(windows, 2, rank, 2, limit=3)]
    assert len(found) == 6
    assert torch.equal(found[0]["tokens"][0], windows[0][:-1])
    assert torch.equal(found[3]["tokens"][1], windows[3 * len(windows) // 12][:-1])  # rank 1, first batch, second row
    assert chosen_windows(windows, 2, 2, limit=1000) == list(range(len(windows)))
    with pytest.raises(UserError, match="expected 1 or more"):
        chosen_windows(windows, 0)


def test_documents_apart(tmp_path):
    """Ids 9 end documents: what follows one is no label, and each batch is one row of documents."""
    documents = [numpy.array([1, 2, 3, 9]), numpy.array([4, 9]), numpy.array([5, 6, 7, 8, 9])]
    windows = Windows([write(tmp_path / "few", documents)], 4, end_of_document=9)
    assert [windows.mask(number).tolist() for number in range(3)] == [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]]
    (batch,) = batches(windows, 3)
    assert batch["tokens"].tolist() == [[1, 2, 3, 9, 4, 9, 5, 6, 7, 8, 9, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 6, 8, 11, 12]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0]]


def test_documents_apart_need_the_ends_of_documents(tmp_path):
    write(tmp_path / "good", [numpy.array([1, 2, 9]), numpy.array([9])])
    write(tmp_path / "bad", [numpy.array([1, 2, 9]), numpy.array([4, 3])])
    good, bad = ([{"prefix": name, "weight": 1.0}] for name in ("good", "bad"))
    blend = {"splits": {"train": good, "test": bad}, "eod": 9}
    (tmp_path / "blend.json").write_text(json.dumps(blend))
    assert end_of_document(tmp_path, "train") == end_of_document(tmp_path) == 9
    with pytest.raises(
        UserError, match="that end with the end-of-document token 9, found token 3 at the end of doc"
    ) as e:
        end_of_document(tmp_path, "train", "test")
    assert str(tmp_path / "bad") in str(e.value) and "document 2" in str(e.value) and "document_mask" in str(e.value)
    (tmp_path / "blend.json").write_text(json.dumps(blend | {"eod": None}))
    with pytest.raises(UserError, match=r"blend.json: expected an eod, the end-of-document id, found None"):
        end_of_document(tmp_path, "train")


@pytest.fixture
def corpus(tmp_path, prefixes) -> Path:
    parts = [{"prefix": prefix.name, "weight": 1 / 3} for prefix in prefixes]
    blend = {"splits": {"train": parts, "test": parts[:1], "validation": []}, "token_bytes": "table.npy"}
    (tmp_path / "blend.json").write_text(json.dumps(blend))
    numpy.save(tmp_path / "table.npy", numpy.arange(128_256, dtype=numpy.int32) % 11)
    return tmp_path


def test_prefixes_of_a_split(corpus, prefixes, tmp_path):
    assert split_prefixes(corpus, "train") == prefixes
    assert split_blend(corpus, "test") == [(prefixes[0], 1 / 3)]
    for split in ("validation", "extra"):
        with pytest.raises(UserError, match=f"expected a split '{split}' with documents, found train, test"):
            split_prefixes(corpus, split)
    with pytest.raises(UserError, match="expected a corpus with a blend.json"):
        split_prefixes(tmp_path / "none", "train")


def test_bytes_of_each_id(corpus):
    assert (mean_token_bytes(corpus, "train", 128_300)[:128_256] == numpy.arange(128_256) % 11).all()
    assert token_bytes(corpus)[13] == 2
    blend = json.loads((corpus / "blend.json").read_text())
    (corpus / "blend.json").write_text(json.dumps(blend | {"token_bytes": None}))
    (corpus / "counts.json").write_text(json.dumps({"splits": {"train": {"bytes": 900, "tokens": 300}}}))
    assert mean_token_bytes(corpus, "train", 5).tolist() == [3.0] * 5


@pytest.mark.parametrize("chosen", [range(10_000), [3], [0, 4, 5, 20]])
def test_documents_are_numbered_as_they_stand_in_the_stream(prefixes, documents, chosen):
    """Each label's document by a plain count, over data sets of which one is a selection of another."""
    windows = Windows(prefixes, 16)
    chosen = [window for window in chosen if window < len(windows)]
    numbers = numpy.repeat(numpy.arange(len(documents)), [len(document) for document in documents])
    seen = set()
    for window in chosen:
        expected = numbers[window * 16 + 1 : window * 16 + 17]
        assert windows.documents(window)[: len(expected)].tolist() == expected.tolist()
        seen |= set(expected.tolist())
    assert windows.documents_of(chosen).tolist() == sorted(seen)
    (batch, *_) = batches(windows, 2, documents=True)
    assert batch["documents"].tolist() == [windows.documents(0).tolist(), windows.documents(1).tolist()]


def test_refusals(tmp_path, prefixes):
    with pytest.raises(UserError, match="sequence_length: expected 1 token or more"):
        Windows(prefixes, 0)
    with pytest.raises(UserError, match="2 tokens or more, found 1"):
        Windows([write(tmp_path / "one", [numpy.array([3])])], 4)
    with pytest.raises(UserError, match="2 tokens or more, found 0"):
        Windows([write(tmp_path / "zero", [])], 4)
    (tmp_path / "one.bin").write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        Windows([tmp_path / "one"], 4)


def test_hashes_tell_rows_apart_whatever_their_order() -> None:
    tokens = torch.arange(64).view(4, 16) % 600
    found = row_hashes(tokens)
    assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < 2**32 and len(set(found.tolist())) == 4
    assert row_hashes(tokens.flip(0)).sum() == found.sum()
    assert row_hashes(tokens.flip(1)).sum() != found.sum(), "the order within a row counts"
    changed = tokens.clone()
    changed[2, 7] += 1
    assert (row_hashes(changed) != found).tolist() == [False, False, True, False]
    many = torch.randint(0, 128_256, (20_000, 8), generator=torch.Generator().manual_seed(1))
    assert len(set(row_hashes(many).tolist())) > 19_990
