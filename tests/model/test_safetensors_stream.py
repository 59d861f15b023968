"""Directories of safetensors: read by slices, written tensor by tensor, and every way in which one can be broken."""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.config import UserError
from pipelines.model.safetensors_stream import Tensors, Writer

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c": torch.arange(7),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}
ANNOUNCED = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def _write(directory: Path, max_shard_bytes: float = 5e9) -> Path:
    with Writer(directory, ANNOUNCED, max_shard_bytes) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    return directory


@pytest.mark.parametrize("max_shard_bytes", [5e9, 100, 1])
def test_what_is_written_is_read_back(tmp_path: Path, max_shard_bytes: float) -> None:
    directory = _write(tmp_path / "model", max_shard_bytes)
    tensors = Tensors(directory)
    assert set(tensors.names) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (tensors.shape(name), tensors.dtype(name)) == ANNOUNCED[name]
        assert torch.equal(tensors[name], tensor)


def test_files_are_filled_up_to_the_limit_and_listed_in_the_index(tmp_path: Path) -> None:
    directory = _write(tmp_path / "model", max_shard_bytes=110)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    # a: 48 bytes, b: 60, c: 56, scalar: 2, empty: 0
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"a": first, "b": first, "c": second, "scalar": second, "empty": second}
    assert index["metadata"]["total_size"] == 48 + 60 + 56 + 2
    assert {path.name for path in directory.iterdir()} == {first, second, "model.safetensors.index.json"}


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    found = load_file(_write(tmp_path / "model") / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_transposed_tensors_are_written_in_order_by_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.model.safetensors_stream._CHUNK_BYTES", 50)
    tensor = torch.arange(60.0).reshape(6, 10).t()
    with Writer(tmp_path / "model", {"t": ((10, 6), torch.float32)}) as writer:
        writer.write("t", tensor)
    assert torch.equal(Tensors(tmp_path / "model")["t"], tensor)


def test_a_slice_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    tensors = Tensors(_write(tmp_path / "model"))
    assert torch.equal(tensors.slice("b", 0, 1, 3), TENSORS["b"][1:3])
    assert torch.equal(tensors.slice("b", 1, 2, 5), TENSORS["b"][:, 2:5])
    assert tensors.slice("b", 0, 2, 2).shape == (0, 6)
    with pytest.raises(AssertionError):
        tensors.slice("b", 0, 3, 6)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a", torch.zeros(4, 3)),
        ("a", torch.zeros(3, 4).double()),
        ("unknown", torch.zeros(1)),
        ("c", TENSORS["c"]),
    ],
)
def test_only_what_was_announced_is_written_and_only_once(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    writer = Writer(tmp_path / "model", ANNOUNCED)
    writer.write("c", TENSORS["c"])
    with pytest.raises(AssertionError, match=name):
        writer.write(name, tensor)
    with pytest.raises(AssertionError, match="4 tensors were not written: a; b; empty; scalar"):
        writer.close()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_leaves_the_earlier_directory(tmp_path: Path) -> None:
    directory = _write(tmp_path / "model")
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(KeyError), Writer(directory, ANNOUNCED) as writer:
        writer.write("a", TENSORS["a"])
        raise KeyError
    assert (directory / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_no_directory_and_a_second_one_starts_afresh(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from pipelines.model.safetensors_stream import Writer\n"
        "writer = Writer(sys.argv[1], {'a': ((2,), torch.float32), 'b': ((2,), torch.float32)}, 1)\n"
        "writer.write('a', torch.ones(2)); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["model.partial"]
    with pytest.raises(UserError, match="found no directory"):
        Tensors(tmp_path / "model")
    _write(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_size_limit_is_one_message(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, torch; from pipelines.model.safetensors_stream import Writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with Writer(sys.argv[1], {'a': ((4096,), torch.float32)}) as writer: writer.write('a', torch.ones(4096))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, tmp_path / "model"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert "UserError" in result.stderr.splitlines()[-1]
    assert "expected room for the weights, found the disk full" in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def _truncate(directory: Path) -> None:
    os.truncate(directory / "model-00002-of-00002.safetensors", 250)


def _append(directory: Path) -> None:
    with (directory / "model-00002-of-00002.safetensors").open("ab") as file:
        file.write(b"more")


def _cut_into_the_header(directory: Path) -> None:
    os.truncate(directory / "model-00002-of-00002.safetensors", 20)


def _empty(directory: Path) -> None:
    os.truncate(directory / "model-00002-of-00002.safetensors", 0)


def _overwrite(directory: Path, offset: int, data: bytes) -> None:
    with (directory / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _change_header(directory: Path, old: bytes, new: bytes) -> None:
    content = (directory / "model-00002-of-00002.safetensors").read_bytes()
    assert len(old) == len(new) and old in content
    (directory / "model-00002-of-00002.safetensors").write_bytes(content.replace(old, new))


def _change_index(directory: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _duplicate(directory: Path) -> None:
    save_file({"a": TENSORS["a"]}, directory / "other.safetensors")
    (directory / "model.safetensors.index.json").unlink()


def _remove_everything(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "pytorch_model.bin").touch()


SECOND = "model-00002-of-00002.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, rf"{SECOND}: expected \d+ bytes from its header, found 250: truncated"),
    "longer": (_append, rf"{SECOND}: expected \d+ bytes from its header, found \d+: truncated or corrupt"),
    "cut into the header": (_cut_into_the_header, rf"{SECOND}: .*found a file of 20 bytes: truncated"),
    "empty": (_empty, rf"{SECOND}: .*found a file of 0 bytes: truncated"),
    "header length": (lambda d: _overwrite(d, 0, b"\xff" * 8), rf"{SECOND}: .*truncated or corrupt"),
    "header not JSON": (lambda d: _overwrite(d, 9, b"\x00\x80("), rf"{SECOND}: expected a safetensors header, found"),
    "header a list": (lambda d: _overwrite(d, 8, b"[]" + b" " * 600), rf"{SECOND}: expected a safetensors header"),
    "offsets": (lambda d: _change_header(d, b"[0,56]", b"[0,48]"), rf"{SECOND}: .*48 bytes for I64 \[7\]"),
    "dtype": (lambda d: _change_header(d, b'"I64"', b'"U63"'), rf"{SECOND}: .*found dtype U63"),
    "missing file": (lambda d: (d / SECOND).unlink(), rf"expected the 2 files of .*index.json, missing {SECOND}"),
    "index not JSON": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        "index.json: expected a JSON object with a weight_map",
    ),
    "index without weight_map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "index.json: expected a JSON object with a weight_map",
    ),
    "index names the wrong file": (
        lambda d: _change_index(d, lambda m: m.update(a=m["c"])),
        f"expected a in {SECOND}, found no such tensor",
    ),
    "index names an unknown tensor": (
        lambda d: _change_index(d, lambda m: m.update(z=m["c"])),
        f"expected z in {SECOND}, found no such tensor",
    ),
    "tensor twice": (_duplicate, "expected each tensor once, found a in .* and in other.safetensors"),
    "two models": (
        lambda d: save_file({"a": TENSORS["a"]}, d / "model.safetensors"),
        "expected one model, found both model.safetensors and the files of",
    ),
    "other format": (_remove_everything, r"expected \*.safetensors files, found none.*pytorch_model.bin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    directory = _write(tmp_path / "model", max_shard_bytes=110)
    change(directory)
    with pytest.raises(UserError, match=message):
        Tensors(directory)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: expected a Hugging Face model directory, found no directory"):
        Tensors(tmp_path / "nowhere")


def test_without_index_every_file_counts_and_with_it_only_those_named(tmp_path: Path) -> None:
    directory = _write(tmp_path / "model", max_shard_bytes=110)
    save_file({"z": torch.zeros(1)}, directory / "consolidated.safetensors")
    assert "z" not in Tensors(directory)
    (directory / "model.safetensors.index.json").unlink()
    assert set(Tensors(directory).names) == {*TENSORS, "z"}


def test_expected_tensors_are_compared_by_name_and_shape(tmp_path: Path) -> None:
    tensors = Tensors(_write(tmp_path / "model"))
    shapes = {name: shape for name, (shape, _) in ANNOUNCED.items()}
    tensors.expect(shapes)
    with pytest.raises(UserError, match="missing 1 of 6: new"):
        tensors.expect(shapes | {"new": (1,)})
    with pytest.raises(UserError, match=r"1 of 5 differ: a: expected \[4, 3\], found \[3, 4\]"):
        tensors.expect(shapes | {"a": (4, 3)})
    fewer = {name: shape for name, shape in shapes.items() if name != "scalar"}
    with pytest.raises(UserError, match="found 1 more: scalar"):
        tensors.expect(fewer)
    tensors.expect(fewer, ignore=["alar"])
    with pytest.raises(UserError, match="expected a tensor new, found none among 5 tensors"):
        tensors["new"]


def test_tensors_do_not_outlive_their_use(tmp_path: Path) -> None:
    tensors = Tensors(_write(tmp_path / "model"))
    found = tensors["b"]
    gone = weakref.ref(found)
    del found
    assert gone() is None
