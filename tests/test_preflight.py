"""The check of a node: what it finds with stand-ins for nvidia-smi and the quota tools, and the command itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import nvidia_smi, preflight, quota
from pipelines.preflight import GIB, Node

GPU = """<gpu id="00000000:{number:02x}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
  <ecc_errors>
    <volatile>
      <sram_correctable>7</sram_correctable>
      <sram_uncorrectable_parity>{sram}</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
      <dram_correctable>12</dram_correctable>
      <dram_uncorrectable>{dram}</dram_uncorrectable>
    </volatile>
    <aggregate><dram_uncorrectable>44</dram_uncorrectable></aggregate>
  </ecc_errors>
  <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
  <remapped_rows>
    <remapped_row_pending>{pending}</remapped_row_pending>
    <remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
</gpu>"""


def xml(count: int = 8, cuda: str = "13.0", sick: int | None = None, **errors: object) -> str:
    sound = {"sram": 0, "dram": 0, "pending": "No"}
    gpus = [GPU.format(number=n, **(sound | errors if n == sick else sound)) for n in range(count)]
    return (
        '<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>'
        f"<driver_version>580.65.06</driver_version><cuda_version>{cuda}</cuda_version>"
        f"<attached_gpus>{count}</attached_gpus>{''.join(gpus)}</nvidia_smi_log>"
    )


def stand_in(directory: Path, name: str, script: str) -> None:
    """A program of this name on PATH."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of PATH, and no answer kept from another test."""
    preflight._smi.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def smi(path: Path, answer: str, code: int = 0) -> None:
    (path / "answer").write_text(answer)
    stand_in(path, "nvidia-smi", f"[ \"$*\" = '-q -x' ] || exit 9; cat {path / 'answer'}; exit {code}")


def node(tmp_path: Path, gpus: int | None = 8, free: int = GIB) -> Node:
    return Node(gpus, tmp_path / "runs", free)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int = 8, cuda: tuple[int, int] | None = (13, 0)) -> None:
    monkeypatch.setattr(preflight, "gpu_count", lambda: count)
    monkeypatch.setattr(preflight, "torch_cuda", lambda: cuda)


def test_a_sound_node_passes(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(path, xml())
    with_gpus(monkeypatch)
    checks = [check(node(tmp_path)) for check in (preflight.gpus, preflight.driver, preflight.memory_errors)]
    assert [check.good for check in checks] == [True] * 3
    assert checks[0].found == "8 x NVIDIA H100 80GB HBM3"
    assert checks[1].found == "580.65.06 for CUDA 13.0"


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({"sram": 2, "dram": 1}, "GPU 3: 3 uncorrectable memory errors since the driver was loaded"),
        ({"pending": "Yes"}, "GPU 3: a row of memory to be remapped at the next reset"),
    ],
)
def test_a_gpu_with_memory_errors_fails(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, errors: dict[str, object], words: str
) -> None:
    smi(path, xml(sick=3, **errors))
    with_gpus(monkeypatch)
    found = preflight.memory_errors(node(tmp_path))
    assert not found.good and found.found == words and "Leave this node out" in found.line()


def test_errors_before_ampere_have_other_names() -> None:
    old = (
        "<nvidia_smi_log><gpu><product_name>Tesla V100</product_name><ecc_errors><volatile><single_bit><total>9</total>"
        "</single_bit><double_bit><total>2</total></double_bit></volatile></ecc_errors>"
        "<retired_pages><pending_blacklist>Yes</pending_blacklist></retired_pages></gpu></nvidia_smi_log>"
    )
    report = nvidia_smi.parse(old)
    assert report.cuda is None and len(report.gpus[0].faults) == 2
    assert report.gpus[0].faults[0].startswith("2 uncorrectable")


def test_a_missing_gpu_fails(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(path, xml(count=7))
    with_gpus(monkeypatch, 7)
    found = preflight.gpus(node(tmp_path))
    assert not found.good and (found.found, found.expected) == ("7 x NVIDIA H100 80GB HBM3", "8 or more")


def test_a_stage_without_gpus_takes_a_node_that_has_some(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(path, xml(count=8))
    with_gpus(monkeypatch, 8)
    for count, device in ((0, ("cpu", 2)), (4, ("cuda", 8))):
        asked = node(tmp_path, gpus=count)
        assert preflight.gpus(asked).good and asked.processes() == device


def test_a_torch_that_cannot_use_the_gpus_is_told_apart(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(path, xml())
    for count in (0, 8):  # a build whose version does not say that it is one for CPUs counts the GPUs all the same
        with_gpus(monkeypatch, count, None)
        found = preflight.gpus(node(tmp_path))
        assert not found.good and found.found == "a torch without CUDA" and "built for CUDA" in found.remedy
    with_gpus(monkeypatch, 0)
    assert preflight.gpus(node(tmp_path)).found == "0 usable of 8"


@pytest.mark.parametrize(
    ("driver", "built", "good"),
    [("13.0", (13, 0), True), ("13.0", (12, 8), True), ("12.8", (13, 0), False), ("13.1", (13, 4), True)],
)
def test_the_driver_must_know_the_major_release_of_cuda(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, built: tuple[int, int], good: bool
) -> None:
    smi(path, xml(cuda=driver))
    with_gpus(monkeypatch, cuda=built)
    found = preflight.driver(node(tmp_path))
    assert found.good is good and f"CUDA {built[0]} (" in found.expected


@pytest.mark.parametrize("answer", ["No devices were found", "<nvidia_smi_log>"])
def test_an_nvidia_smi_that_fails_fails_the_node(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    smi(path, answer, code=6 if answer.startswith("No") else 0)
    with_gpus(monkeypatch)
    assert not preflight.driver(node(tmp_path)).good and not preflight.memory_errors(node(tmp_path)).good


def test_an_nvidia_smi_that_hangs_fails_the_node(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(path, "nvidia-smi", "exec sleep 30")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT", 0.2)
    with_gpus(monkeypatch)
    found = preflight.memory_errors(node(tmp_path))
    assert not found.good and "no answer in 0.2 s" in found.found


def test_a_memory_lock_matters_where_infiniband_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.resource, "getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(preflight, "INFINIBAND", tmp_path / "none")
    assert preflight.memory_lock(node(tmp_path)).good
    (tmp_path / "infiniband" / "mlx5_0").mkdir(parents=True)
    monkeypatch.setattr(preflight, "INFINIBAND", tmp_path / "infiniband")
    found = preflight.memory_lock(node(tmp_path))
    assert not found.good and found.found == "64 KiB" and "mlx5_0" in found.expected


def test_docker_s_shared_memory_is_too_small_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.quota, "room", lambda place: quota.Room(64 * 2**20, None))
    with_gpus(monkeypatch, 0)
    assert preflight.shared_memory(node(tmp_path)).good
    with_gpus(monkeypatch)
    found = preflight.shared_memory(node(tmp_path))
    assert not found.good and "--ipc=host" in found.remedy


def test_a_disk_that_is_too_small_or_refuses_fails(tmp_path: Path) -> None:
    assert preflight.disk(node(tmp_path)).good
    assert list((tmp_path / "runs").iterdir()) == [], "what was written to try it is gone"
    assert not preflight.disk(node(tmp_path, free=2**60)).good
    (tmp_path / "file").touch()
    found = preflight.disk(Node(None, tmp_path / "file", 1))
    assert not found.good and "another run.directory" in found.remedy


def test_a_clock_that_is_wrong_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    assert preflight.clock(node(tmp_path)).good
    now = preflight.time.time()
    monkeypatch.setattr(preflight.time, "time", lambda: now + 300)
    assert not preflight.clock(node(tmp_path)).good


MOUNTS = "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\no2ib:/scratch /my\\040scratch lustre rw 0 0\n"


def test_the_mount_of_a_directory_is_the_innermost() -> None:
    assert quota.mount_of(Path("/home/me/runs"), MOUNTS) == ("server:/home", "/home", "nfs4")
    assert quota.mount_of(Path("/my scratch/runs"), MOUNTS) == ("o2ib:/scratch", "/my scratch", "lustre")
    assert quota.mount_of(Path("/homes"), MOUNTS) == ("/dev/vda", "/", "ext4")


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("server:/home 1000000 2000000 3000000 0 5 0 0 0", 2_000_000 * 1024),
        ("server:/home 1000000 1500000 0 0 5 0 0 0", 500_000 * 1024),
        ("server:/home 3000001* 2000000 3000000 6days 5 0 0", 0),
        ("server:/home 1000000 0 0 0 5 0 0 0", None),
        ("server:/other 1 2 3 0", None),
        ("Disk quotas for user me (uid 1000): none", None),
    ],
)
def test_what_a_quota_leaves(answer: str, left: int | None) -> None:
    assert quota.left(answer, "server:/home") == left


@pytest.mark.parametrize(("kind", "program"), [("lustre", "lfs"), ("nfs4", "quota")])
def test_a_quota_that_leaves_too_little_fails(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, program: str
) -> None:
    monkeypatch.setattr(quota, "mount_of", lambda directory: ("place", "place", kind))
    stand_in(path, program, "echo '     place  1048576  0  2097152  -  1 0 0 -'")
    assert preflight.disk(node(tmp_path, free=GIB)).good
    found = preflight.disk(node(tmp_path, free=2 * GIB))
    assert not found.good and "1.0 GiB left of the quota" in found.found


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    whole = [sys.executable, "-m", "pipelines.preflight", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, timeout=90, env=os.environ)


def test_the_command_says_in_json_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, with the all-reduce over two processes, also from inside a job whose ranks are others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("WORLD_SIZE", "64")
    done = command("--json", "--directory", str(tmp_path / "runs"), "--free-gib", "0.01")
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and answer["fit"] and answer["seconds"] < 60, done.stdout
    names = [check["name"] for check in answer["checks"]]
    assert names == ["GPUs", "driver", "GPU memory", "memory lock", "shared memory", "disk", "clock", "all-reduce"]
    assert answer["checks"][-1]["found"].startswith("2 processes, ")


def test_the_command_ends_with_3_and_a_line_per_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "CHECKS", (preflight.gpus, preflight.disk))
    with_gpus(monkeypatch, 0)
    assert preflight.main(["--gpus", "4", "--directory", str(tmp_path / "runs"), "--free-gib", "0.01"]) == 3
    first, second = capsys.readouterr().out.splitlines()
    assert "FAILED  GPUs" in first and "expected 4 or more. " in first
    assert "ok      disk" in second


def test_lines_of_nccl_on_the_standard_output_do_not_spoil_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('NCCL version 2.27.5+cuda13.0', flush=True)")
    monkeypatch.setenv(
        "PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}" if "PYTHONPATH" in os.environ else str(tmp_path)
    )
    (one,) = preflight.exchanged("cpu", 2, tmp_path, ["all_reduce"], [4096], 60.0)
    assert isinstance(one, dict) and one["bytes"] == 4096


def test_a_process_that_ends_is_told_before_the_time_is_up(tmp_path: Path) -> None:
    found = preflight.exchanged("cpu", 2, tmp_path, ["nothing"], [4096], 60.0)
    assert isinstance(found, str) and found.startswith("process ")


@pytest.mark.parametrize(
    "arguments", [["--gpus", "-1"], ["--free-gib", "-5"], ["--free-gib", "nan"], ["--gpus", "two"]]
)
def test_numbers_that_no_node_has_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        preflight.main(arguments)
    told = capsys.readouterr().err
    assert f"argument {arguments[0]}: " in told and arguments[1] in told
