"""What each kind of source reads, in which order, and what it says about bad input."""

import gzip
import json
from pathlib import Path

import pytest

from pipelines.config import SourceKind, UserError
from pipelines.text import chunks, sources, standard_library
from tests.text.conftest import make_documents, write_jsonl


def read(
    path: Path | str | None, kind: SourceKind = SourceKind.auto, text_key="text", document_bytes=None
) -> list[str]:
    where = None if path is None else str(path)
    source = sources.open_source(where, sources.resolve_kind(where, kind), text_key, document_bytes)
    source.check()
    found = [text for chunk in source.chunks() for text in chunk.documents()]
    assert sum(chunk.size for chunk in source.chunks()) == pytest.approx(source.size, rel=0.05)
    return found


@pytest.fixture
def texts() -> list[str]:
    return make_documents(40, seed=3)


@pytest.mark.parametrize("chunk", [100, 1 << 19])
def test_json_lines(tmp_path, monkeypatch, texts, chunk):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    path = write_jsonl(tmp_path / "d.jsonl", texts, key="content")
    assert read(path, text_key="content") == texts
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(packed, text_key="content") == texts
    assert read(tmp_path, text_key="content") == texts + texts  # d.jsonl before d.jsonl.gz
    path.write_bytes(b"\n" + path.read_bytes().rstrip(b"\n"))  # an empty line, and none at the end
    assert read(path, text_key="content") == texts


def test_text_files(tmp_path, monkeypatch, texts):
    monkeypatch.setattr(chunks, "CHUNK", 500)
    (tmp_path / "b" / "c").mkdir(parents=True)
    for number, name in enumerate(["z.txt", "b/c/a.txt", "b/.hidden.txt", "b/a.md"]):
        (tmp_path / name).write_bytes(texts[number].encode())
    assert read(tmp_path) == [texts[3], texts[1], texts[0]]  # by path; hidden files left out
    assert read(f"{tmp_path}/**/*.txt") == [texts[1], texts[0]]
    (tmp_path / "z.txt").write_bytes("\N{BYTE ORDER MARK}with a mark".encode())
    assert read(tmp_path / "z.txt") == ["with a mark"]


def test_text_cut_into_documents(tmp_path, texts):
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(texts) + "\nno blank line from here\n" * 200)
    found = read(path, document_bytes=1000)
    assert "".join(found) == path.read_text()
    assert all(1000 <= len(t.encode()) <= 2600 for t in found[:-1])
    assert found[0].endswith("\n\n")


def test_tables(tmp_path, texts):
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [*texts, None], "other": list(range(41))})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    assert read(tmp_path / "d.parquet") == [*texts, ""]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == texts
    for path in (tmp_path / "d.parquet", tmp_path / "saved"):
        with pytest.raises(UserError, match="expected a column 'body', found text"):
            read(path, text_key="body")
    with pytest.raises(UserError, match="expected text in the column 'other', found int64"):
        read(tmp_path / "d.parquet", text_key="other")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="a dictionary of train.*splits/train"):
        read(tmp_path / "splits")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((tmp_path / "d.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="expected a parquet file"):
        read(broken)


def test_standard_library():
    source = sources.open_source(None, SourceKind.standard_library, "text", None)
    names = [path.name for path in standard_library.files()]
    assert "argparse.py" in names and "test_argparse.py" not in names
    assert source.size > 5_000_000 and sum(c.size for c in source.chunks()) == source.size
    documentation = list(standard_library.documentation())
    assert any("Return the number of items in a container" in text for text in documentation)
    assert documentation == list(standard_library.documentation())


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3: expected a JSON object, found an error at column"),
        ('{"text": "a"} {}', "line 3: expected a JSON object, found an error"),
        ("[1]", 'line 3: expected a JSON object such as {"text": "..."}, found a list'),
        (
            '{"body": "a", "id": 1}',
            "line 3: expected a string under the key 'text', found none; the line's keys: body, id",
        ),
        ('{"text": 5}', "line 3: expected a string under the key 'text', found a int there"),
        ('{"text": "\\ud800"}', "line 3: expected text, found half a surrogate pair"),
        ("[" * 100_000, "line 3: expected"),
        ("caf\xe9".encode("latin1"), "line 3: expected UTF-8 text, found the byte 0xe9 at byte 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    good = json.dumps({"text": "fine"}).encode()
    path.write_bytes(b"\n".join([good, good, line.encode() if isinstance(line, str) else line, good]))
    with pytest.raises(UserError) as error:
        read(path)
    assert f"{path}, {message}" in str(error.value)


def test_bad_files(tmp_path, monkeypatch, texts):
    def refused(path, message, **settings):
        with pytest.raises(UserError, match=message):
            read(path, **settings)

    (tmp_path / "latin.txt").write_bytes(b"abc\xe9")
    refused(tmp_path / "latin.txt", "latin.txt: expected UTF-8 text, found the byte 0xe9 at byte 3")
    refused(tmp_path / "latin.txt", "byte 0xe9 at byte 3", document_bytes=2, kind=SourceKind.text)
    refused(tmp_path / "none.jsonl", "none.jsonl: expected a file.*found nothing")
    refused(tmp_path / "none*.txt", "expected a file.*found nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "found a directory without any")
    refused(tmp_path / "empty", "parquet.*found a directory without any", kind=SourceKind.parquet)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    refused(tmp_path / "empty.jsonl", "found not a single document")
    (tmp_path / "d.csv").write_text("a,b")
    refused(tmp_path / "d.csv", "expected files of one kind.*found .csv")
    refused(tmp_path, "expected files of one kind")
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"text": texts}).encode())[:-9])
    refused(packed, "expected a whole gzip file")
    packed.write_bytes(b"not gzip")
    refused(packed, "expected a whole gzip file")
    refused(packed, "document_bytes: expected", document_bytes=5)
    refused(tmp_path / "d.csv", "expected no path", kind=SourceKind.standard_library)
    refused(None, "expected a path", kind=SourceKind.text)
    refused(tmp_path / "d.csv", "save_to_disk", kind=SourceKind.datasets)
    refused(tmp_path / "empty", "save_to_disk", kind=SourceKind.datasets)
    monkeypatch.setattr(chunks, "LARGEST", 10)
    (tmp_path / "large.txt").write_text("a" * 11)
    refused(tmp_path / "large.txt", "expected documents of at most 10 bytes, found 11")
