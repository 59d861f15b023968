"""A new machine, tried by the commands that users type: is it fit to train here?

Every part runs in processes of its own, as it would in earnest: the node's own check; stage=verify at every layout that
its processes allow, with the real communication library and, where it is there, Transformer Engine; the bandwidth of
the collectives; whole steps of model= and student= with random weights; a small run that is trained, killed with
SIGKILL, continued, and compared with one that was left alone; its export. Writes accept.json, and one row for
docs/MEASURED.md with everything that identifies the machine. For one machine: several have their own launchers.
"""

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines import artifacts, console, files, lineage, nvidia_smi, preflight, processes, stopping
from pipelines.config import UserError, layout
from pipelines.model import measure
from pipelines.model.collectives import KINDS
from pipelines.site_settings import AcceptPart

PATIENCE = 900.0  # seconds for the collectives, and for the first checkpoint of the run that is killed
FILE = "accept.json"


class Trial:
    """One acceptance: where it works, what it found."""

    def __init__(self, context: artifacts.StageContext) -> None:
        self.config, self.directory = context.config, context.directory
        self.ranks = layout(context.config.parallel)
        self.found: dict[str, Any] = {}

    def command(self, *overrides: str) -> list[str]:
        """`python -m pipelines` on this machine's device, with runs in a directory of the trial's own."""
        own = [f"run.directory={self.directory / 'runs'}", f"parallel.device={self.ranks.device}"]
        return [sys.executable, "-m", "pipelines", *overrides, *own]

    def run(self, *overrides: str) -> str:
        """What a command printed. Raises UserError with its message where it failed."""
        done = subprocess.run(self.command(*overrides), env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"accept: expected `{shown(overrides)}` to end well, found exit code {done.returncode}:\n"
                f"{done.stderr.strip()[-3000:]}"
            )
        return done.stdout


def run(context: artifacts.StageContext) -> dict[str, Any]:
    """Raises UserError with the first part that fails; what was found so far stands in accept.json."""
    trial, started = Trial(context), time.monotonic()
    shutil.rmtree(trial.directory / "runs", ignore_errors=True)  # what an earlier trial found says nothing of today
    trial.found["machine"] = machine(trial)
    for part, work in PARTS.items():
        if part not in context.config.accept.parts:
            continue
        console.say(f"accept  {part.value}")
        try:
            trial.found[part.value] = work(trial)
        finally:
            trial.found["seconds"] = round(time.monotonic() - started, 1)
            files.write_json(context.directory / FILE, trial.found)
    trial.found["accepted"] = set(context.config.accept.parts) == set(AcceptPart)
    files.write_json(context.directory / FILE, trial.found)
    line = row(trial.found)
    verdict = "accepted" if trial.found["accepted"] else "not all parts were asked for: nothing is accepted yet"
    console.say(f"accept  {verdict}, {trial.found['seconds']:,.0f} s; {context.directory / FILE}\n{HEADER}\n{line}")
    return trial.found


def environment() -> dict[str, str]:
    """This process's, without what makes it the child of a stage."""
    return processes.environment_outside_ranks(stopping.EXCHANGE, stopping.VERDICT, stopping.STOP_FILE)


def shown(overrides: tuple[str, ...]) -> str:
    return " ".join(["python -m pipelines", *overrides])


# The parts


def node(trial: Trial) -> dict[str, Any]:
    gpus = trial.ranks.processes if trial.ranks.device == "cuda" else 0
    arguments = ["--json", "--directory", str(trial.directory), *(["--gpus", str(gpus)] if gpus else [])]
    command = [sys.executable, "-m", "pipelines.preflight", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"checks": [], "fit": False}
    bad = [f"{c['name']}: expected {c['expected']}, found {c['found']}" for c in answer["checks"] if not c["good"]]
    if not answer["fit"]:
        told = "\n  ".join(bad) or done.stderr[-2000:]
        raise UserError(f"accept: expected a node that is fit, found:\n  {told}\nSee docs/site.md.")
    for check in answer["checks"]:
        console.say(f"accept    {check['name']}: {check['found']}")
    return answer


def layouts(processes: int) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline) of every layout of so many processes; what is left is data-parallel."""
    for tensor in range(1, processes + 1):
        for pipeline in range(1, processes // tensor + 1):
            if processes % (tensor * pipeline) == 0:
                yield tensor, pipeline


def verify(trial: Trial) -> dict[str, Any]:
    """Every layout; tensor parallelism with sequence parallelism, replicas with the distributed optimizer."""
    found = {}
    for tensor, pipeline in layouts(trial.ranks.processes):
        data = trial.ranks.processes // (tensor * pipeline)
        name = f"TP {tensor} x PP {pipeline} x DP {data}"
        started = time.monotonic()
        output = trial.run(
            "stage=verify",
            f"parallel.processes={trial.ranks.processes}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.sequence_parallel={'true' if tensor > 1 else 'false'}",
            f"distil.distributed_optimizer={'true' if data > 1 else 'false'}",
        )
        last = next(line for line in reversed(output.splitlines()) if "all within tolerance" in line)
        engine = next((line for line in output.splitlines() if line.startswith("engine")), "")
        found[name] = {"seconds": round(time.monotonic() - started, 1), "engine": engine.removeprefix("engine").strip()}
        console.say(f"accept    {name}: {last.removeprefix('verify').strip()}")
    return found


def bandwidth(trial: Trial) -> list[dict[str, Any]]:
    """Every collective over all processes; nothing to measure for one alone."""
    if trial.ranks.processes == 1:
        console.say("accept    one process: no collectives")
        return []
    sizes = trial.config.accept.bandwidth_bytes
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        found = preflight.exchanged(
            trial.ranks.device, trial.ranks.processes, Path(place), list(KINDS), sizes, PATIENCE
        )
    if isinstance(found, str):
        raise UserError(f"accept: expected right results of every collective, found: {found}. See docs/site.md.")
    for one in found:
        rate = f"{one['bytes_per_second'] / 1e9:,.2f} GB/s"
        console.say(f"accept    {one['kind']} of {one['bytes']:,} bytes: {one['seconds'] * 1e3:,.3f} ms, {rate}")
    return found


def steps(trial: Trial) -> dict[str, Any]:
    """Whole training steps of the models that the command names, as stage=benchmark times them."""
    settings, on_gpu = trial.config.accept, trial.ranks.device == "cuda"
    asked = [override for override in sys.argv[1:] if not override.startswith(("stage=", "run.", "accept."))]
    trial.run(
        *asked,
        "stage=benchmark",
        "run.name=steps",
        "benchmark.contenders=[stillhouse]",
        "benchmark.tokens=[]",
        "benchmark.vocabularies=[]",
        "benchmark.scoring_micro_batch_sizes=[]",
        "benchmark.micro_batch_sizes=[1]",
        f"benchmark.rounds={settings.steps}",
        "benchmark.warmup=2",
        f"benchmark.sequence_length={settings.sequence_length}",
        f"benchmark.precision={'bf16' if on_gpu else 'fp32'}",
        "parallel.pipeline=1",
        "parallel.context=1",
    )
    rows: list[dict[str, Any]] = json.loads((trial.directory / "runs" / "benchmark" / "steps.json").read_text())
    last = rows[-1]
    if not last["seconds"]:
        raise UserError(f"accept: expected a step of these models, found: {last['reason']}. Use more GPUs.")
    console.say(
        f"accept    {last['student_parameters']:,} of {last['teacher_parameters']:,} parameters: {last['seconds']:.3f} "
        f"s per step, {last['tokens_per_second']:,.0f} tokens/s"
    )
    return last


def resume(trial: Trial) -> dict[str, Any]:
    """A run left alone, and one whose rank is killed after a checkpoint and that is started again: the same losses."""
    small = ("experiment=acceptance", f"parallel.processes={trial.ranks.processes}")
    trial.run(*small, "run.name=whole", "stage=[corpus,teacher,prune,distil,export]")
    whole, killed = trial.directory / "runs" / "whole", trial.directory / "runs" / "killed"
    overrides = (
        *small,
        "run.name=killed",
        "stage=distil",
        f"data.corpus={whole / 'corpus'}",
        "teacher=take",
        f"model.path={whole / 'teacher' / 'hf'}",
        f"student.path={whole / 'prune' / 'hf'}",
    )
    step = _kill_after_a_checkpoint(trial, overrides, killed / "distil")
    trial.run(*overrides)
    one, other = losses(whole / "distil"), losses(killed / "distil")
    if one.keys() != other.keys():
        raise UserError(f"accept: expected the steps {sorted(one)} after kill -9, found {sorted(other)}.")
    apart = max(abs(one[place] - other[place]) / abs(one[place]) for place in one)
    # On a CPU every bit is the same; on GPUs attention's gradients are summed in an order that varies.
    if apart > (1e-3 if trial.ranks.device == "cuda" else 0):
        raise UserError(f"accept: expected the losses of a run that was left alone, found them {apart:.1e} apart.")
    exported = artifacts.read_manifest(whole / "export")["figures"]["relative_difference"]
    console.say(f"accept    killed after a checkpoint, continued: losses {apart:.1e} apart over {len(one)} steps")
    console.say(f"accept    export: logits in transformers differ by {exported:.1e}")
    return {"steps": len(one), "killed_after": step, "losses_apart": apart, "export_difference": exported}


PARTS: dict[AcceptPart, Callable[[Trial], Any]] = {
    AcceptPart.node: node,
    AcceptPart.verify: verify,
    AcceptPart.bandwidth: bandwidth,
    AcceptPart.steps: steps,
    AcceptPart.resume: resume,
}


def losses(stage: Path) -> dict[int, float]:
    """{step: loss of training} of metrics.jsonl; of a step that was made twice the last."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _kill_after_a_checkpoint(trial: Trial, overrides: tuple[str, ...], stage: Path) -> int:
    """Start, wait for a checkpoint, SIGKILL one rank, wait for the end. The step of the newest checkpoint's row."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(trial.command(*overrides), env=environment(), stdout=errors, stderr=errors)
        deadline = time.monotonic() + PATIENCE
        while not _checkpoints(stage):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                errors.seek(0)
                raise UserError(f"accept: expected a checkpoint to kill after, found none:\n{errors.read()[-3000:]}")
            time.sleep(0.02)
        for rank in ranks_below(process.pid)[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        if process.wait() == 0:
            raise UserError("accept: expected a killed run to fail, found that it had ended. Start it again.")
    return max(losses(stage), default=0)


def _checkpoints(stage: Path) -> list[Path]:
    """Whole ones: a checkpoint has this name once it is written."""
    return list((stage / "checkpoints").glob("step-*"))


def ranks_below(pid: int) -> list[int]:
    """The processes below one that have RANK in their environment, by rank."""
    found: dict[int, int] = {}
    for one in processes.descendants(pid):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{one}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found.setdefault(int(entry[5:]), one)
    return [found[rank] for rank in sorted(found)]


# What identifies the machine


def machine(trial: Trial) -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "image": os.environ.get("STILLHOUSE_IMAGE", "none"),
        "processes": trial.ranks.processes,
        "device": measure.device_name(torch.device("cpu")),
        "driver": "none",
        "interconnect": interconnect(),
        **{
            name: value for name, value in lineage.describe(trial.config).items() if name in ("git", "versions", "host")
        },
    }
    if trial.ranks.device == "cuda":
        try:
            report = nvidia_smi.read()
        except nvidia_smi.Unanswered as reason:
            raise UserError(f"accept: expected nvidia-smi to tell the GPUs, found {reason}.") from None
        names = ", ".join(dict.fromkeys(gpu.name for gpu in report.gpus))
        found |= {"device": names, "driver": report.driver, "cuda": report.cuda}
    return found


def interconnect() -> str:
    """NVLink by nvidia-smi's matrix, and the adapters of InfiniBand with their rates; none where there is neither."""
    found = []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "topo", "-m"]
        matrix = subprocess.run(command, capture_output=True, text=True, timeout=nvidia_smi.TIMEOUT).stdout
        links = sorted({word for word in matrix.split() if word.startswith("NV") and word[2:].isdigit()})
        found += [f"NVLink {', '.join(links)}"] if links else []
    for rate in sorted(preflight.INFINIBAND.glob("*/ports/*/rate")):
        found.append(f"{rate.parts[-4]} {rate.read_text().strip()}")
    return "; ".join(found) or "none"


HEADER = (
    "| date | commit | image | device | driver | versions | interconnect | layouts verified | collectives, GB/s | step "
    "| after kill -9 | export |\n" + "|---" * 12 + "|"
)


def row(found: dict[str, Any]) -> str:
    """One row for docs/MEASURED.md; what was not asked for is a dash."""
    here, versions = found["machine"], found["machine"]["versions"]
    commit = str(here["git"])
    names = ("torch", "nemo-toolkit", "megatron-core", "transformer-engine")
    told = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    rates = [
        f"{kind} {max(one['bytes_per_second'] for one in found['bandwidth'] if one['kind'] == kind) / 1e9:,.2f}"
        for kind in dict.fromkeys(one["kind"] for one in found.get("bandwidth", []))
    ]
    step, resumed = found.get("steps"), found.get("resume")
    speed = f"{step['seconds']:.3f} s, {step['tokens_per_second']:,.0f} tokens/s" if step else "-"
    cells = [
        here["date"],
        commit[:12] + "-dirty" * commit.endswith("-dirty"),
        here["image"],
        f"{here['processes']} x {here['device']}" if here["driver"] != "none" else here["device"],
        here["driver"],
        told,
        here["interconnect"],
        ", ".join(found.get("verify", {})) or "-",
        ", ".join(rates) or "-",
        speed,
        f"losses {resumed['losses_apart']:.1e} apart" if resumed else "-",
        f"{resumed['export_difference']:.1e}" if resumed else "-",
    ]
    return "| " + " | ".join(cells) + " |"
