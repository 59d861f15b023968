"""Chains on a SLURM of the tests' own: two nodes on this machine, submitted by launchers/slurm.sh as users do.

All but one test play the stages (tests/cluster/play.py), so that what counts is the chain: what is submitted, who is
told to stop, what is started again, and when it ends.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import slurm
from tests.slurm import Slurm, wait_for

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(ROOT / "launchers" / "slurm.sh")
SETTINGS = ["experiment=quickstart", "cluster=local", "cluster.preflight=false", "stage=[corpus,teacher,prune]"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "can be started"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    home = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    started = Slurm(home)
    yield started
    started.close()
    shutil.rmtree(home)


class Run:
    """One run on the cluster, whose stages do what `play` says."""

    def __init__(self, cluster: Slurm, place: Path) -> None:
        self.cluster, self.place, self.home = cluster, place, place / "runs" / place.name
        (place / "sitecustomize.py").write_text((Path(__file__).parent / "play.py").read_text())
        self.play()

    def play(self, **stages: dict[str, Any]) -> None:
        (self.place / "play.json").write_text(json.dumps(stages))

    def launch(self, *overrides: str, code: int = 0) -> str:
        names = {o.partition("=")[0] for o in overrides}
        settings = [s for s in SETTINGS if s.partition("=")[0] not in names]
        settings += [f"run.directory={self.place / 'runs'}", f"run.name={self.place.name}"]
        done = subprocess.run(
            [LAUNCHER, *settings, *overrides],
            cwd=self.place,
            env=self.cluster.environment | {"PYTHONPATH": str(self.place), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *overrides: str) -> dict[str, str]:
        """{stage: job}"""
        self.launch(*overrides)
        return slurm.chain(self.home)

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in sorted((self.home / "slurm" / "logs").iterdir()))

    def log(self, stage: str, job: str) -> str:
        return (self.home / "slurm" / "logs" / f"{self.place.name}-{stage}_{job}.log").read_text()

    def notes(self, name: str) -> list[str]:
        file = self.home / name
        return file.read_text().splitlines() if file.exists() else []

    def is_complete(self, stage: str) -> bool:
        return (self.home / stage / "complete").is_file()


@pytest.fixture
def run(cluster: Slurm, tmp_path: Path) -> Iterator[Run]:
    found = Run(cluster, tmp_path)
    yield found
    if jobs := [line for line in cluster.ask("squeue", "--noheader", "--format=%i").split() if line]:
        cluster.ask("scancel", *jobs)
        wait_for(lambda: not cluster.ask("squeue", "--noheader"), "jobs to end")


def test_a_chain_goes_over_two_nodes_and_a_second_one_waits(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"steps": 40})
    dry = run.launch("--dry-run")
    scripts = {file.name: file.read_bytes() for file in (run.home / "slurm").glob("*.sh")}
    assert "nothing was submitted" in dry and not cluster.ask("squeue", "--noheader")
    jobs = run.submit()
    assert {file.name: file.read_bytes() for file in (run.home / "slurm").glob("*.sh")} == scripts
    for name, stage in zip(sorted(scripts), jobs, strict=True):
        taken = cluster.ask("scontrol", "write", "batch_script", jobs[stage], "-")
        assert taken.encode().rstrip(b"\0\n") == scripts[name].rstrip(b"\n")
    assert cluster.show(jobs["teacher"])["Dependency"] == f"afterok:{jobs['corpus']}(unfulfilled)"
    refused = run.launch(code=2)
    assert all(job in refused for job in jobs.values()) and "scancel" in refused
    assert [cluster.end(job) for job in jobs.values()] == ["COMPLETED"] * 3
    assert sorted(run.notes("teacher.starts")) == ["0 of 2 on node1", "1 of 2 on node2"]
    assert run.notes("corpus.starts") == ["0 of 1 on node1"]
    assert all(map(run.is_complete, jobs))
    assert "stage prune" in run.log("prune", jobs["prune"]).splitlines()[-1]
    assert "nothing is left to do" in run.launch()


def test_before_the_time_limit_a_stage_saves_and_its_job_is_requeued(run: Run, cluster: Slurm) -> None:
    """SLURM gives its warning when as many seconds are left as the script asks for."""
    run.play(teacher={"steps": 300, "unsaved": True})
    settings = ["cluster.stages.teacher.time='2:00'", "cluster.warning_seconds=115", "cluster.grace_seconds=50"]
    jobs = run.submit(*settings, "stage=[corpus,teacher]")
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    log = run.log("teacher", jobs["teacher"])
    assert "SIGUSR1: asking stage teacher to save and stop" in log and "requeueing job" in log
    starts = [int(line.partition(": ")[2]) for line in run.notes("teacher.from") if line.startswith("0")]
    assert starts[0] == 0 and starts == sorted(starts) and len(starts) >= 2 and starts[1] > 0


def test_a_requeued_job_is_not_stopped_by_its_own_old_stop_file(run: Run, cluster: Slurm) -> None:
    """Preempted as an administrator does it: SLURM ends the job and puts it back into the queue."""
    run.play(teacher={"steps": 60})
    jobs = run.submit("stage=[corpus,teacher]")
    wait_for(lambda: run.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scontrol", "requeue", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    assert cluster.show(jobs["teacher"])["Restarts"] == "1"
    assert run.is_complete("teacher")


def test_a_killed_rank_is_started_again_in_place(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"steps": 30, "fault": "kill"})
    jobs = run.submit("stage=[corpus,teacher]")
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    assert cluster.show(jobs["teacher"])["Restarts"] == "0"
    assert "restart 1 of at most 3, from step-0000010" in run.log("teacher", jobs["teacher"])
    assert {"0: 0", "0: 10"} == {line for line in run.notes("teacher.from") if line.startswith("0")}


def test_what_is_killed_each_time_ends_for_good_and_so_does_the_chain(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"steps": 30, "fault": "kill", "always": True, "unsaved": True})
    jobs = run.submit("cluster.restarts=1")
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert cluster.end(jobs["prune"], 30) in ("CANCELLED", "GONE")
    last = run.log("teacher", jobs["teacher"]).splitlines()[-1]
    assert "stage teacher" in last and "ended for good" in last and "after 1 restarts without a new checkpoint" in last


def test_a_stage_that_fails_for_good_ends_the_chain_which_then_continues(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"fault": "user"})
    jobs = run.submit()
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert cluster.show(jobs["teacher"])["ExitCode"] == "2:0"
    assert cluster.end(jobs["prune"], 30) in ("CANCELLED", "GONE")
    last = run.log("teacher", jobs["teacher"]).splitlines()[-1]
    assert "stage teacher" in last and "data.sources: expected text, found none. Give some." in last
    run.play()
    again = run.submit()
    assert list(again) == ["teacher", "prune"]
    assert [cluster.end(job) for job in again.values()] == ["COMPLETED"] * 2
    assert len(run.notes("corpus.starts")) == 1


def test_a_dead_node_is_left_out_and_the_stage_continues(run: Run, cluster: Slurm) -> None:
    """Its daemon and all it runs are killed; SLURM takes the job back and starts it again once there are nodes."""
    run.play(teacher={"steps": 80})
    jobs = run.submit("stage=[corpus,teacher]")
    wait_for(lambda: (run.home / "teacher" / "checkpoints" / "step-0000010").exists(), "a checkpoint", 240)
    cluster.kill_node("node2")
    wait_for(lambda: cluster.show(jobs["teacher"]).get("Restarts") == "1", "SLURM to take the job back", 240)
    cluster.start_node("node2")
    cluster.ask("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    starts = [int(line.partition(": ")[2]) for line in run.notes("teacher.from")]
    assert max(starts) >= 10 and run.is_complete("teacher")


def test_without_requeueing_a_new_job_continues_and_dependents_follow_it(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"steps": 60})
    jobs = run.submit("cluster.requeue=false")
    wait_for(lambda: run.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "FAILED"
    log = run.log("teacher", jobs["teacher"])
    new = re.search(r"job (\d+) continues", log)
    assert new and f"job {jobs['prune']} waits for job {new[1]} now" in log
    assert cluster.end(new[1]) == "COMPLETED"
    assert cluster.end(jobs["prune"]) == "COMPLETED"
    assert run.is_complete("prune")


def test_processes_that_do_not_stop_in_time_are_ended(run: Run, cluster: Slurm) -> None:
    run.play(teacher={"steps": 10_000, "deaf": True})
    jobs = run.submit("stage=[corpus,teacher]", "cluster.grace_seconds=3", "cluster.restarts=0")
    wait_for(lambda: run.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert "not stopped after 3 s: ending the processes" in run.log("teacher", jobs["teacher"])
