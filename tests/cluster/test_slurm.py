"""Chains on a SLURM of the tests' own: two nodes on this machine, submitted by launchers/slurm.sh as users do.

All but one test play the stages (tests/cluster/play.py), so that what counts is the chain: what is submitted, who is
told to stop, what is started again, and when it ends.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import begin
from pipelines.compose import compose
from tests import slurm
from tests.slurm import Slurm, wait_for
from tests.test_pipeline import QUALITY_ALONE, SMALL

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = str(ROOT / "launchers" / "slurm.sh")
SETTINGS = ["experiment=quickstart", "cluster=local", "cluster.preflight=false", "stage=[teacher,prune]"]

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

    def __init__(self, cluster: Slurm, place: Path, plays: bool = True) -> None:
        self.cluster, self.place, self.home = cluster, place, place / "runs" / place.name
        if plays:
            (place / "sitecustomize.py").write_text((Path(__file__).parent / "play.py").read_text())
        self.environment = cluster.environment | {"PYTHONPATH": str(place), "PYTHON": sys.executable}
        self.play()

    def make_corpus(self) -> None:
        """As if an earlier chain had: a job less to wait for."""
        settings = [f"run.directory={self.place / 'runs'}", f"run.name={self.place.name}", "experiment=quickstart"]
        attempt = begin(compose(settings), "corpus", lambda line: None)
        (self.home / "corpus" / "tokens").write_text("")
        attempt.finish({})

    def play(self, **stages: dict[str, Any]) -> None:
        (self.place / "play.json").write_text(json.dumps(stages))

    def launch(self, *overrides: str, code: int = 0) -> str:
        names = {o.partition("=")[0] for o in overrides}
        settings = [s for s in SETTINGS if s.partition("=")[0] not in names]
        settings += [f"run.directory={self.place / 'runs'}", f"run.name={self.place.name}"]
        done = subprocess.run(
            [LAUNCHER, *settings, *overrides],
            cwd=self.place,
            env=self.environment,
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

    def end(self) -> None:
        """Of its jobs that are left."""
        lines = [line.split("|") for line in self.cluster.ask("squeue", "--noheader", "--format=%i|%o").splitlines()]
        if jobs := [job for job, command in lines if command.startswith(str(self.home))]:
            self.cluster.ask("scancel", *jobs)
            for job in jobs:
                self.cluster.end(job)

    def notes(self, name: str) -> list[str]:
        file = self.home / name
        return file.read_text().splitlines() if file.exists() else []

    def is_complete(self, stage: str) -> bool:
        return (self.home / stage / "complete").is_file()


@pytest.fixture
def run(cluster: Slurm, tmp_path: Path) -> Iterator[Run]:
    found = Run(cluster, tmp_path)
    yield found
    found.end()


@pytest.fixture
def begun(run: Run) -> Run:
    """A run whose corpus is there."""
    run.make_corpus()
    return run


@pytest.fixture(scope="module", autouse=True)
def warned(cluster: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """(run, job) whose teacher SLURM warns a minute and a half after its start: the other tests go on meanwhile."""
    run = Run(cluster, tmp_path_factory.mktemp("warned"))
    run.make_corpus()
    run.play(teacher={"steps": 1200, "unsaved": True})
    limits = ["cluster.time=00:03:00", "cluster.warning_seconds=90", "cluster.grace_seconds=10"]
    yield run, run.submit("stage=teacher", *limits)["teacher"]
    run.end()


def test_a_chain_goes_over_two_nodes_and_a_second_one_waits(run: Run, cluster: Slurm) -> None:
    seen = run.place / "seen"
    run.play(corpus={"until": str(seen)}, teacher={"steps": 40})
    stages = "stage=[corpus,teacher,prune]"
    dry = run.launch("--dry-run", stages)
    scripts = {file.name: file.read_bytes() for file in (run.home / "slurm").glob("*.sh")}
    assert "nothing was submitted" in dry and not run.logs()
    jobs = run.submit(stages)
    assert {file.name: file.read_bytes() for file in (run.home / "slurm").glob("*.sh")} == scripts
    for name, stage in zip(sorted(scripts), jobs, strict=True):
        taken = cluster.ask("scontrol", "write", "batch_script", jobs[stage], "-")
        assert taken.encode().rstrip(b"\0\n") == scripts[name].rstrip(b"\n")
    assert cluster.show(jobs["teacher"])["Dependency"] == f"afterok:{jobs['corpus']}(unfulfilled)"
    refused = run.launch(stages, code=2)
    assert all(job in refused for job in jobs.values()) and "scancel" in refused
    seen.touch()
    assert [cluster.end(job) for job in jobs.values()] == ["COMPLETED"] * 3
    starts = [line.split(" of 2 on ") for line in sorted(run.notes("teacher.starts"))]  # torchrun chooses who is rank 0
    assert [rank for rank, _ in starts] == ["0", "1"] and {node for _, node in starts} == {"node1", "node2"}
    assert run.notes("corpus.starts") == ["0 of 1 on node1"]
    assert all(map(run.is_complete, jobs))
    assert "stage prune" in run.log("prune", jobs["prune"]).splitlines()[-1]
    assert "nothing is left to do" in run.launch(stages)


def test_a_requeued_job_is_not_stopped_by_its_own_old_stop_file(begun: Run, cluster: Slurm) -> None:
    """Preempted as an administrator does it: SLURM ends the job and puts it back into the queue."""
    begun.play(teacher={"steps": 60})
    jobs = begun.submit("stage=teacher")
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scontrol", "requeue", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    assert cluster.show(jobs["teacher"])["Restarts"] == "1"
    assert begun.is_complete("teacher")


def test_a_job_that_is_cancelled_after_a_warning_has_saved_and_is_not_continued(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"steps": 600, "unsaved": True})
    jobs = begun.submit()
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    cluster.ask("scancel", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "CANCELLED"
    assert cluster.end(jobs["prune"], 30) in ("CANCELLED", "GONE")
    assert "was cancelled, and so nothing continues it" in begun.log("teacher", jobs["teacher"]).splitlines()[-1]
    assert not [
        line for line in cluster.ask("squeue", "--noheader", "--format=%o").splitlines() if str(begun.home) in line
    ]
    assert cluster.show(jobs["teacher"])["Restarts"] == "0" and not begun.is_complete("teacher")


def test_a_job_that_another_preempts_and_slurm_does_not_requeue_continues_in_a_new_one(
    begun: Run, cluster: Slurm
) -> None:
    begun.play(teacher={"steps": 60})
    jobs = begun.submit("stage=teacher", "cluster.requeue=false", "cluster.exclusive=true")
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.ask("sbatch", *urgent)
    assert cluster.end(jobs["teacher"]) == "PREEMPTED"
    new = re.search(r"preempted: job (\d+) continues", begun.log("teacher", jobs["teacher"]))
    assert new and cluster.end(new[1]) == "COMPLETED", begun.logs()
    assert begun.is_complete("teacher")


def test_a_killed_rank_is_started_again_in_place(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"steps": 30, "fault": "kill"})
    jobs = begun.submit("stage=teacher")
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    assert cluster.show(jobs["teacher"])["Restarts"] == "0"
    assert "restart 1 of at most 3, from step-0000010" in begun.log("teacher", jobs["teacher"])
    assert {"0: 0", "0: 10"} == {line for line in begun.notes("teacher.from") if line.startswith("0")}


def test_what_is_killed_each_time_ends_for_good_and_so_does_the_chain(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"steps": 30, "fault": "kill", "always": True, "unsaved": True})
    jobs = begun.submit("cluster.restarts=1")
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert cluster.end(jobs["prune"], 30) in ("CANCELLED", "GONE")
    last = begun.log("teacher", jobs["teacher"]).splitlines()[-1]
    assert "stage teacher" in last and "ended for good" in last and "after 1 restarts without a new checkpoint" in last


def test_a_stage_that_fails_for_good_ends_the_chain_which_then_continues(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"fault": "user"})
    jobs = begun.submit()
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert cluster.show(jobs["teacher"])["ExitCode"] == "2:0"
    assert cluster.end(jobs["prune"], 30) in ("CANCELLED", "GONE")
    last = begun.log("teacher", jobs["teacher"]).splitlines()[-1]
    assert "stage teacher" in last and "data.sources: expected text, found none. Give some." in last
    begun.play()
    again = begun.submit()
    assert list(again) == ["teacher", "prune"]
    assert [cluster.end(job) for job in again.values()] == ["COMPLETED"] * 2


def test_a_node_that_fails_its_check_is_left_out(begun: Run, cluster: Slurm) -> None:
    """The interpreter of the nodes is one that fails the check on the first of them alone."""
    python = begun.place / "python"
    check = '[ "$2 $SLURMD_NODENAME" != "pipelines.preflight node1" ] || { echo "FAILED  disk  found none"; exit 3; }'
    python.write_text(f'#!/bin/bash\n{check}\n[ "$2" = pipelines.preflight ] || exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings = ["cluster.preflight=true", f"cluster.python={python}", "cluster.nodes=1"]
    jobs = begun.submit(*settings)
    assert cluster.end(jobs["teacher"]) == "FAILED"
    log = begun.log("teacher", jobs["teacher"])
    assert "node node1 failed its check (exit code 3):" in log and "FAILED  disk  found none" in log
    new = re.search(r"job (\d+) continues without node1", log)
    assert new and cluster.end(new[1]) == "COMPLETED"
    assert begun.notes("teacher.starts") == ["0 of 1 on node2"]


def test_processes_run_in_the_container_as_pyxis_takes_it(begun: Run, cluster: Slurm) -> None:
    """A stand-in for pyxis on the path before srun: it refuses what pyxis would, notes its options and drops them."""
    image, stand_in = begun.place / "stillhouse.sqsh", begun.place / "bin" / "srun"
    image.touch()
    stand_in.parent.mkdir()
    stand_in.write_text((Path(__file__).parent / "pyxis.sh").read_text())
    stand_in.chmod(0o755)
    begun.environment |= {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "NOTED": str(begun.place / "noted")}
    begun.environment |= {"REAL_SRUN": str(slurm.find("srun"))}
    mounts = f"cluster.mounts=[{begun.place},'/usr/share:/data:ro']"
    settings = [f"cluster.image={image}", mounts, f"cluster.python={sys.executable}"]
    played = f"{ROOT}:{begun.place}"
    settings.append(f"cluster.environment=[{{name: PYTHONPATH, value: '{played}', why: stages that are played}}]")
    jobs = begun.submit(*settings, "stage=teacher")
    assert cluster.end(jobs["teacher"]) == "COMPLETED", begun.logs()
    assert (begun.place / "noted").read_text().splitlines() == [
        f"--container-image={image}",
        f"--container-mounts={begun.place}:{begun.place},/usr/share:/data:ro",
        f"--container-workdir={begun.place}",
        "--no-container-mount-home",
    ]


def test_without_requeueing_a_new_job_continues_and_dependents_follow_it(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"steps": 60})
    jobs = begun.submit("cluster.requeue=false")
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "FAILED"
    log = begun.log("teacher", jobs["teacher"])
    new = re.search(r"job (\d+) continues", log)
    assert new and f"job {jobs['prune']} waits for job {new[1]} now" in log
    assert cluster.end(new[1]) == "COMPLETED"
    assert cluster.end(jobs["prune"]) == "COMPLETED"
    assert begun.is_complete("prune")


def test_a_requeue_that_slurm_denies_and_carries_out_gives_no_second_writer(begun: Run, cluster: Slurm) -> None:
    """As with 'Socket timed out': the new job waits until SLURM's own restart of the old one has ended."""
    stand_in = begun.place / "bin" / "scontrol"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\n{slurm.find("scontrol")} "$@" && [ "$1" != requeue ]\n')
    stand_in.chmod(0o755)
    begun.environment |= {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    begun.play(teacher={"steps": 60})
    jobs = begun.submit("stage=teacher")
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    new = wait_for(lambda: re.search(r"job (\d+) continues", begun.log("teacher", jobs["teacher"])), "a new job", 120)
    assert cluster.end(new[1]) == "COMPLETED", begun.logs()
    old = cluster.show(jobs["teacher"])
    assert old["JobState"] == "COMPLETED" and old["Restarts"] == "1"
    assert cluster.show(new[1])["StartTime"] >= old["EndTime"]
    assert len(begun.notes("teacher.starts")) == 4, "two ranks, before and after; the new job finds it finished"


def test_processes_that_do_not_stop_in_time_are_ended(begun: Run, cluster: Slurm) -> None:
    begun.play(teacher={"steps": 10_000, "deaf": True})
    jobs = begun.submit("stage=teacher", "cluster.grace_seconds=3", "cluster.restarts=0")
    wait_for(lambda: begun.notes("teacher.from"), "the teacher to train", 240)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    assert cluster.end(jobs["teacher"]) == "FAILED"
    assert "not stopped after 3 s: ending the processes" in begun.log("teacher", jobs["teacher"])


def test_before_the_time_limit_a_stage_saves_and_its_job_is_requeued(warned: tuple[Run, str], cluster: Slurm) -> None:
    run, job = warned
    assert cluster.end(job) == "COMPLETED"
    log = run.log("teacher", job)
    assert "SIGUSR1: asking stage teacher to save and stop" in log and "requeueing job" in log
    starts = [int(line.partition(": ")[2]) for line in run.notes("teacher.from") if line.startswith("0")]
    assert starts[0] == 0 and starts == sorted(starts) and len(starts) >= 2 and starts[1] > 0


def test_a_dead_node_is_left_out_and_the_stage_continues(begun: Run, cluster: Slurm) -> None:
    """Its daemon and all it runs are killed; SLURM takes the job back and starts it again once there are nodes."""
    begun.play(teacher={"steps": 80})
    jobs = begun.submit("stage=teacher")
    wait_for(lambda: (begun.home / "teacher" / "checkpoints" / "step-0000010").exists(), "a checkpoint", 240)
    cluster.kill_node("node2")
    wait_for(lambda: cluster.show(jobs["teacher"]).get("Restarts") == "1", "SLURM to take the job back", 240)
    cluster.start_node("node2")
    cluster.ask("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert cluster.end(jobs["teacher"]) == "COMPLETED"
    starts = [int(line.partition(": ")[2]) for line in begun.notes("teacher.from")]
    assert max(starts) >= 10 and begun.is_complete("teacher")


def test_text_becomes_a_student_and_a_report_over_two_nodes(cluster: Slurm, tmp_path: Path) -> None:
    """The real stages, tensor-parallel over both nodes; the distillation is asked to stop, requeued, and continues."""
    run = Run(cluster, tmp_path, plays=False)
    settings = [s for s in SMALL if not s.startswith(("export.", "teacher.steps"))]
    stages = "stage=[corpus,teacher,prune,distil,evaluate,report]"
    jobs = run.submit(*settings, *QUALITY_ALONE, stages, "teacher.steps=12", "distil.steps=25", "parallel=tp2")
    metrics = run.home / "distil" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 2' in metrics.read_text(), "the distillation to train", 900)
    cluster.ask("scancel", "--batch", "--signal=USR1", jobs["distil"])
    assert cluster.end(jobs["report"], 900) == "COMPLETED", run.logs()
    assert cluster.show(jobs["distil"])["Restarts"] == "1"
    log = run.log("distil", jobs["distil"])
    assert "stage distil has saved and stopped: requeueing" in log and "continues from" in log
    steps = [row["step"] for row in map(json.loads, metrics.read_text().splitlines()) if row["split"] == "train"]
    assert sorted(set(steps)) == list(range(1, 26)) and len(steps) == len(set(steps))
    layout = json.loads((run.home / "distil" / "manifest.json").read_text())["layout"]
    assert (layout["processes"], layout["tensor"]) == (2, 2)
    page = run.home / "report" / "index.html"
    assert str(page) in run.log("report", jobs["report"]) and page.is_file()
