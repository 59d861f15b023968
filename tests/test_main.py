"""The command line as a user meets it: messages, exit codes, and what is left of its processes.

Stages are played by a stand-in that a sitecustomize.py puts into every child; what it does is in PLAY.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import launch
from pipelines.__main__ import stage_names
from pipelines.config import Config, UserError
from pipelines.processes import environment_outside_ranks
from pipelines.stages import PIPELINE, STAGES

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import os, sys, time, types

def run(context):
    from pipelines import console
    from pipelines.config import UserError
    rank, play = os.environ.get("RANK", "0"), os.environ.get("PLAY", "")
    print("noise of a library", flush=True)
    print("more noise", file=sys.stderr, flush=True)
    (context.directory / f"rank{rank}").write_text(str(os.getpid()))
    console.say(f"hello from rank {rank}")
    if play == "blend":
        (context.directory / "blend.json").write_text('{"splits": {"train": []}, "vocab_size": 8}')
        return {}
    if play == "few":
        import struct
        from pipelines import index_header
        head = index_header.MAGIC + index_header.HEADER.pack(1, 8, 1, 2)
        (context.directory / "x.idx").write_bytes(head + struct.pack("<iq2q", 65, 0, 0, 1))
        (context.directory / "x.bin").write_bytes(bytes(130))
        splits = dict.fromkeys(("train", "validation", "test", "calibration"), [{"prefix": "x", "weight": 1.0}])
        (context.directory / "blend.json").write_text(__import__("json").dumps({"splits": splits, "vocab_size": 8}))
        return {}
    if play == "sleep":
        time.sleep(300)
    if play == "short":
        time.sleep(3)
    if play == "disk":
        raise OSError(28, "No space left on device", "model.safetensors")
    if play == "exit":
        sys.exit(3)
    if play == "term":  # as Lightning's SIGTERMException
        raise SystemExit
    if rank == os.environ.get("GUILTY", "0"):
        if play == "user":
            raise UserError("expected a thing, found another. Change it.")
        if play == "ours":
            raise RuntimeError("our own fault")
        if play == "killed":
            os.kill(os.getpid(), 9)
    elif play:
        time.sleep(300)
    return {"rank": int(rank)}

for name in ("corpus", "teacher", "verify"):
    module = types.ModuleType("pipelines.stages." + name)
    module.run = run
    sys.modules[module.__name__] = module
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start the command line with overrides, in a run directory of the test's own."""
    (tmp_path / "sitecustomize.py").write_text(STAND_IN)

    def popen(*overrides: str, **environment: str) -> subprocess.Popen:
        env = environment_outside_ranks()
        env |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": "", **environment}
        command = [sys.executable, "-m", "pipelines", *overrides]
        if overrides and not overrides[0].startswith("-"):
            command.append(f"run.directory={tmp_path / 'runs'}")
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return popen


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("arguments", [[], ["--help"], ["stage=all", "-h"]])
def test_help_names_stages_groups_and_examples(start: Start, arguments: list[str]) -> None:
    code, out, error = finish(start(*arguments))
    assert code == 0 and error == ""
    assert all(stage.does in out for stage in STAGES.values())
    assert "quickstart_depth" in out and "stage=all experiment=quickstart" in out


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("distil.kd_wieght=1", "Did you mean distil.kd_weight"),
        ("stage=distill", "Did you mean distil"),
        ("parallel=tp3", "no such option"),
        ("--stage=plan", "expected key=value"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(start: Start, override: str, part: str) -> None:
    code, out, error = finish(start("stage=plan", override))
    assert code == 2 and out == ""
    assert part in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_plan_as_json_is_json_alone_and_needs_no_torch(start: Start) -> None:
    process = start("stage=plan", "experiment=llama31_8b_to_4b_width", "format=json", PYTHONPROFILEIMPORTTIME="1")
    code, out, error = finish(process)
    assert code == 0
    assert json.loads(out)["student"]["parameters"] == 4_512_746_496
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in error.splitlines()}
    assert "omegaconf" in imported
    assert not imported & {"torch", "megatron", "nemo", "lightning", "transformers", "numpy"}


def test_the_composed_configuration_can_be_shown(start: Start) -> None:
    code, out, _ = finish(start("distil.steps=77", "--cfg", "job"))
    assert code == 0 and "steps: 77" in out


def test_a_stage_runs_once_and_shows_its_own_lines_only(start: Start, tmp_path: Path) -> None:
    code, out, error = finish(start("stage=corpus"))
    directory = tmp_path / "runs" / "quickstart" / "corpus"
    assert (code, error) == (0, "")
    first, last = out.splitlines()
    assert first == "hello from rank 0"
    assert last.startswith("corpus  ") and last.endswith(f" s  {directory}")
    assert "noise of a library" in (tmp_path / "runs" / "quickstart" / "logs" / "corpus.log").read_text()
    assert json.loads((directory / "manifest.json").read_text())["figures"] == {"rank": 0}
    code, out, _ = finish(start("stage=corpus"))
    assert code == 0 and out == f"corpus: finished already in {directory}\n"
    code, out, error = finish(start("stage=corpus", "data.test_fraction=0.1"))
    assert code == 2 and "data.test_fraction: 0.02 -> 0.1" in error and "overwrite=true" in error
    code, out, _ = finish(start("stage=corpus", "data.test_fraction=0.1", "overwrite=true"))
    assert code == 0 and "hello" in out


def test_stages_run_in_the_order_of_the_table(start: Start) -> None:
    code, out, error = finish(start("stage=[teacher,corpus]", "experiment=quickstart", "parallel=tp1"))
    assert code == 0, error
    assert [line.split()[0] for line in out.splitlines() if " s  " in line] == ["corpus", "teacher"]


def test_a_later_stage_that_has_changed_is_refused_before_an_earlier_one_starts(start: Start, tmp_path: Path) -> None:
    assert finish(start("stage=[corpus,teacher]", "experiment=quickstart", "parallel=tp1"))[0] == 0
    (tmp_path / "runs" / "quickstart" / "corpus" / "complete").unlink()
    code, out, error = finish(start("stage=[corpus,teacher]", "experiment=quickstart", "teacher.steps=99"))
    assert code == 2 and out == "" and "teacher.steps: " in error and "-> 99" in error


def test_what_an_earlier_stage_made_is_checked_before_the_next_one_starts(start: Start) -> None:
    code, out, error = finish(start("stage=[corpus,teacher]", "experiment=quickstart", PLAY="blend"))
    assert code == 2 and "expected the train split, which stage teacher reads" in error
    assert out.count(" s  ") == 1 and len(error.splitlines()) == 1


def test_a_mistake_that_only_a_child_finds_is_told_to_its_parent(start: Start, tmp_path: Path) -> None:
    code, _, _ = finish(start("stage=verify", "verify.tolerance=-1", STILLHOUSE_EXCHANGE=str(tmp_path)))
    told = json.loads((tmp_path / "failure-0.json").read_text())
    assert code == told["code"] == 2 and told["user"] and "verify.tolerance" in told["message"]


def test_ranks_of_another_launcher_say_a_mistake_once_per_machine(start: Start) -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    mistake = ("stage=verify", "parallel=tp2", "verify.tolerance=-1")
    ranks = [start(*mistake, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
    results = [finish(rank) for rank in ranks]
    assert [code for code, _, _ in results] == [2, 2]
    assert "verify.tolerance" in results[0][2] and results[1][2] == ""


def test_a_given_corpus_is_not_made_again(start: Start, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "blend.json").write_text("{}")
    code, out, _ = finish(start("stage=corpus", f"data.corpus={tmp_path / 'made'}"))
    assert code == 0 and "nothing to do, data.corpus=" in out


def test_a_full_disk_is_one_message(start: Start) -> None:
    code, _, error = finish(start("stage=corpus", PLAY="disk"))
    assert code == 2 and "No space left on device" in error and "it continues" in error and "Traceback" not in error


def test_a_stages_own_exit_code_is_the_commands(start: Start) -> None:
    assert finish(start("stage=corpus", PLAY="exit"))[0] == 3


def test_a_failure_of_ours_shows_the_traceback_and_the_log(start: Start, tmp_path: Path) -> None:
    code, _, error = finish(start("stage=corpus", PLAY="ours"))
    assert code == 1
    assert "RuntimeError: our own fault" in error and error.count("Traceback") == 1
    assert error.splitlines()[-1] == f"log: {tmp_path / 'runs' / 'quickstart' / 'logs' / 'corpus.log'}"
    assert not (tmp_path / "runs" / "quickstart" / "corpus" / "complete").exists()


def test_every_rank_runs_and_only_rank_0_is_seen(start: Start, tmp_path: Path) -> None:
    code, out, error = finish(start("stage=verify", "parallel=tp2"))
    assert (code, error) == (0, "")
    assert {path.name for path in (tmp_path / "runs" / "quickstart" / "verify").iterdir()} == {"rank0", "rank1"}
    assert "hello from rank 0" in out and "rank 1" not in out and "noise" not in out


def test_a_mistake_found_by_one_rank_is_one_message_and_ends_the_others(start: Start) -> None:
    code, _, error = finish(start("stage=verify", "parallel=tp2", PLAY="user", GUILTY="1"))
    assert code == 2
    assert error == "expected a thing, found another. Change it.\n"


def test_a_rank_that_is_killed_is_named_by_its_signal(start: Start) -> None:
    code, _, error = finish(start("stage=verify", "parallel=tp2", PLAY="killed", GUILTY="1"))
    assert code == 1
    assert "ended by SIGKILL" in error and "memory" in error and "log: " in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_command_ends_its_ranks(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    process = start("stage=verify", "parallel=tp2", PLAY="sleep")
    marks = [tmp_path / "runs" / "quickstart" / "verify" / f"rank{rank}" for rank in range(2)]
    wait_for(lambda: all(mark.is_file() and mark.read_text() for mark in marks), process)
    ranks = [int(mark.read_text()) for mark in marks]
    assert all(map(is_running, ranks))
    process.send_signal(number)
    code, _, error = finish(process)
    deadline = time.monotonic() + 60
    while any(map(is_running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, ranks))
    if number != signal.SIGKILL:
        assert code == 130 and "interrupted" in error and "Traceback" not in error


def test_asked_to_stop_the_command_ends_behind_the_stage_that_cannot(start: Start, tmp_path: Path) -> None:
    process = start("stage=[corpus,teacher]", "experiment=quickstart", "parallel=tp1", PLAY="short")
    wait_for(lambda: (tmp_path / "runs" / "quickstart" / "corpus" / "rank0").is_file(), process)
    process.send_signal(signal.SIGUSR1)
    code, out, error = finish(process)
    assert code == 75 and error == "stopped as asked before teacher began; the same command continues.\n"
    assert (tmp_path / "runs" / "quickstart" / "corpus" / "complete").is_file()
    code, out, _ = finish(start("stage=[corpus,teacher]", "experiment=quickstart", "parallel=tp1"))
    assert code == 0 and "corpus: finished already" in out and "teacher  " in out


def test_ranks_of_another_launcher_stop_by_a_file_and_leave_the_reason(start: Start, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment |= {"STILLHOUSE_STOP_FILE": str(tmp_path / "stop"), "STILLHOUSE_VERDICT": str(tmp_path / "verdict")}
    arguments = ("stage=verify", "parallel=tp2")
    ranks = [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
    results = [finish(rank) for rank in ranks]
    assert [code for code, _, _ in results] == [75, 75]
    verdict = json.loads((tmp_path / "verdict").read_text())
    assert (verdict["code"], verdict["stage"]) == (75, "verify") and "before verify began" in verdict["message"]


@pytest.mark.parametrize(("play", "code"), [("user", 2), ("ours", 1), ("exit", 3), ("term", None), ("", None)])
def test_the_verdict_has_the_code_that_torchrun_hides(start: Start, tmp_path: Path, play: str, code: int) -> None:
    verdict = tmp_path / "verdict"
    ended, _, error = finish(start("stage=corpus", PLAY=play, STILLHOUSE_VERDICT=str(verdict)))
    if play == "term":
        assert ended == 130 and "ended by SIGTERM; the same command continues" in error
    assert verdict.exists() == (code is not None)
    if code:
        assert json.loads(verdict.read_text())["code"] == code


def test_ranks_that_another_launcher_started_share_one_stage(start: Start, tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    arguments = ("stage=[corpus,teacher]", "experiment=quickstart", "parallel=tp2")
    for attempt, expected in enumerate(("hello from rank 0", "finished already")):
        environment["SLURM_STEP_ID"] = str(attempt)
        ranks = [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **environment) for rank in range(2)]
        results = [finish(rank) for rank in ranks]
        assert [result[0] for result in results] == [0, 0]
        assert expected in results[0][1] and results[1][1] == ""
    teacher = tmp_path / "runs" / "quickstart" / "teacher"
    assert {"rank0", "rank1", "complete"} <= {path.name for path in teacher.iterdir()}
    assert len(list((tmp_path / "runs" / "quickstart" / "logs").glob(".teacher-*"))) == 1


def test_stage_takes_a_name_a_list_or_all() -> None:
    config = Config()
    for asked, expected in (
        ("distil", ["distil"]),
        (["report", "corpus"], ["corpus", "report"]),
        ("all", list(PIPELINE)),
    ):
        config.stage = asked
        assert stage_names(config) == expected
    for wrong in ("everything", ["corpus", "prun"], []):
        config.stage = wrong
        with pytest.raises(UserError, match="expected all or some of fetch, corpus"):
            stage_names(config)


def test_the_command_of_a_child_has_one_stage_and_the_same_overrides() -> None:
    overrides = ["stage=[corpus,distil]", "distil.steps=3", "+stage=all"]
    plain, ranks = launch.command("corpus", 1, overrides), launch.command("distil", 4, overrides)
    assert plain[1:] == ["-m", "pipelines", "distil.steps=3", "stage=corpus"]
    assert "--nproc-per-node=4" in ranks and ranks[-4:] == ["-m", "pipelines", "distil.steps=3", "stage=distil"]


def failure_of(tmp_path: Path, failures: list[dict], log: str = "", code: int = 1) -> launch.StageFailed:
    exchange, file = tmp_path / "exchange", tmp_path / "stage.log"
    exchange.mkdir(exist_ok=True)
    for rank, failure in enumerate(failures):
        (exchange / f"failure-{rank}.json").write_text(json.dumps(failure))
    file.write_text("an earlier run: exitcode : -11\n" + log)
    return launch._failure(exchange, file, len("an earlier run: exitcode : -11\n"), code)


def test_of_many_failures_the_users_mistake_is_told_else_the_first(tmp_path: Path) -> None:
    later = {"user": False, "time": 2.0, "code": 1, "message": "connection closed"}
    first = {"user": False, "time": 1.0, "code": 1, "message": "our fault"}
    mistake = {"user": True, "time": 3.0, "code": 2, "message": "your mistake"}
    assert str(failure_of(tmp_path, [later, first])) == f"our fault\nlog: {tmp_path / 'stage.log'}"
    told = failure_of(tmp_path, [later, first, mistake])
    assert (str(told), told.code) == ("your mistake", 2)


def test_of_many_signals_the_one_that_torchrun_did_not_send_is_told(tmp_path: Path) -> None:
    log = "  exitcode  : -15 (pid: 1)\n  exitcode  : -9 (pid: 2)\n"
    assert "ended by SIGKILL" in str(failure_of(tmp_path, [], log))
    assert "ended by SIGSEGV" in str(failure_of(tmp_path, [], "", code=-11))
    told = str(failure_of(tmp_path, [], "something odd\n", code=1))
    assert "exit code 1" in told and "something odd" in told and "an earlier run" not in told


def test_a_corpus_that_is_too_small_to_prune_on_is_told_before_the_teacher_is_trained(
    start: Start, tmp_path: Path
) -> None:
    asked = [
        "experiment=quickstart",
        "stage=[corpus,teacher,prune]",
        "prune.calibration_samples=2",
        "prune.sequence_length=64",
    ]
    code, _, error = finish(start(*asked, PLAY="few"))
    assert code == 2 and "prune.calibration_samples: expected 2 sequences of 64 tokens" in error and "found 1" in error
    run = tmp_path / "runs" / "quickstart"
    assert (run / "corpus" / "complete").is_file() and not (run / "teacher").exists()
