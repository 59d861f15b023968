"""The .bin/.idx writer and reader against Megatron's own."""

import re
from pathlib import Path

import numpy
import pytest
import torch

from pipelines.config import UserError
from pipelines.text import indexed


@pytest.fixture(scope="module")
def megatron():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


def some_documents(count: int, vocab_size: int) -> list[numpy.ndarray]:
    rng = numpy.random.default_rng(7)
    return [rng.integers(0, vocab_size, size=n) for n in rng.integers(1, 50, size=count)]


def write(prefix: Path, documents: list[numpy.ndarray], vocab_size: int) -> None:
    writer = indexed.Writer(prefix, indexed.id_type(vocab_size))
    for start in range(0, len(documents), 7):
        part = documents[start : start + 7]
        writer.add(numpy.concatenate(part), numpy.array([len(d) for d in part], numpy.int32))
    writer.finish()


@pytest.mark.parametrize("vocab_size", [4096, 65_499, 65_500, 128_256])
def test_same_bytes_as_megatrons_builder(tmp_path, monkeypatch, megatron, vocab_size):
    monkeypatch.setattr(indexed, "BLOCK", 16)  # so that an index takes many blocks
    documents = some_documents(100, vocab_size)
    documents[3][0] = vocab_size - 1
    kind = megatron.DType.optimal_dtype(vocab_size)
    assert indexed.id_type(vocab_size) == numpy.dtype(kind)
    write(tmp_path / "ours", documents, vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=kind)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == 100 and all((read[n] == documents[n]).all() for n in range(100))
    assert read[3][0] == vocab_size - 1  # a uint16 would wrap 128,255 to 62,719
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx", "theirs.bin", "theirs.idx"]


def test_selection_copies_no_token_and_reads_back(tmp_path, monkeypatch, megatron):
    monkeypatch.setattr(indexed, "BLOCK", 16)
    documents = some_documents(60, 128_256)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "all.bin"), dtype=numpy.int32)
    for document in documents:  # two sequences each
        builder.add_document(torch.from_numpy(document), [1, len(document) - 1] if len(document) > 1 else [1])
    builder.finalize(str(tmp_path / "all.idx"))
    chosen = numpy.arange(60) % 3 == 1
    indexed.write_selection(tmp_path / "all", indexed.read_index(tmp_path / "all"), chosen, tmp_path / "some" / "part")
    assert (tmp_path / "some" / "part.bin").is_symlink()
    read = megatron.IndexedDataset(str(tmp_path / "some" / "part"))
    assert len(read.document_indices) - 1 == 20
    for number, document in enumerate(d for d, c in zip(documents, chosen, strict=True) if c):
        first, last = read.document_indices[number : number + 2]
        assert (numpy.concatenate([read.get(s) for s in range(first, last)]) == document).all()


def broken(tmp_path: Path, change) -> str:
    write(tmp_path / "d", some_documents(20, 1000), 1000)
    change(tmp_path / "d.bin", tmp_path / "d.idx")
    with pytest.raises(UserError) as error:
        indexed.read_index(tmp_path / "d")
    return str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b, i: b.write_bytes(b.read_bytes()[:-1]), r"d.bin: expected at least [\d,]+ bytes.*truncated"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), r"d.idx: expected [\d,]+ bytes.*truncated"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:20]), "another kind of file"),
        (lambda b, i: i.write_bytes(b"x" * 500), "another kind of file"),
        (lambda b, i: i.write_bytes(i.read_bytes() + bytes(20)), "multimodal"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:17] + b"\x06" + i.read_bytes()[18:]), "integer ids.*type code 6"),
        (lambda b, i: i.write_bytes(i.read_bytes()[:-8] + bytes(8)), "cover every sequence"),
        (lambda b, i: b.unlink(), "found no .*d.bin"),
        (lambda b, i: i.unlink(), "found no .*d.idx"),
    ],
)
def test_refuses_what_is_broken(tmp_path, change, message):
    found = broken(tmp_path, change)
    assert re.search(message, found), found


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "d.bin").symlink_to("/dev/full")
    writer = indexed.Writer(tmp_path / "d", numpy.dtype(numpy.int32))
    with pytest.raises(OSError) as error:
        for _ in range(100):
            writer.add(numpy.zeros(10_000, numpy.int32), numpy.array([10_000], numpy.int32))
    writer.abandon()
    assert error.value.strerror == "No space left on device" and error.value.filename == str(tmp_path / "d.bin")
