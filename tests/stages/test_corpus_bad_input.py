"""What the corpus stage says about bad input, and what a full disk or a kill leaves."""

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipelines import processes
from pipelines.config import SourceConfig, SourceKind, UserError
from pipelines.text import sources
from tests.stages.corpora import contents, existing, make
from tests.text.conftest import make_documents, write_jsonl


def test_ids_beyond_the_tokenizer_and_tokenizers_beyond_the_model_are_refused(tmp_path, jsonl, made):
    with pytest.raises(UserError, match="at most 500 ids, the vocab_size of model.shape; found 600"):
        make(tmp_path / "c", [jsonl], vocab_size=500, tokenizer=str(made / "tokenizer"))
    source = SourceConfig(path=existing(tmp_path / "d", [[5, 6]] * 10 + [[5, 128_255]]))
    with pytest.raises(UserError, match=r"d.bin, document 11: expected ids below 600.*found 128,255.*data.tokenizer"):
        make(tmp_path / "c", [source], tokenizer=str(made / "tokenizer"), validation_fraction=0)
    with pytest.raises(UserError, match="expected the tokenizer that these ids were made with.*data.tokenizer"):
        make(tmp_path / "c", [source])
    assert not (tmp_path / "c" / "blend.json").exists()


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
            from tests.stages import corpora
            from pipelines.config import SourceConfig
            from pipelines.text import writing

            class Slow(writing.indexed.Writer):
                def add(self, ids, lengths):
                    super().add(ids, lengths)
                    Path({str(tmp_path / "writing")!r}).touch()
                    time.sleep(60)

            if __name__ == "__main__":
                writing.indexed.Writer = Slow
                corpora.make(Path({str(tmp_path / "c")!r}), [SourceConfig(path={jsonl.path!r})], workers=2)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script)], env=environment)
    while not (tmp_path / "writing").exists():
        assert process.poll() is None
        time.sleep(0.05)
    workers = processes.children(process.pid)
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
