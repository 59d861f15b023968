"""A new machine, tried by the commands that users type: is it fit to train here?

Every part runs in processes of its own, as it would in earnest: the node's own check; stage=verify at every layout that
its processes allow, with the real communication library and, where it is there, Transformer Engine; the bandwidth of
the collectives; whole steps of model= and student= with random weights; a small run that is trained, killed with
SIGKILL, continued, and compared with one that was left alone; its export. Writes accept.json, and one row for
docs/MEASURED.md with everything that identifies the machine. Of several machines (model/machines.py) this stage runs on
the first; every command that needs ranks is started on all of them.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines import artifacts, console, files, preflight, stopping
from pipelines.config import UserError, layout
from pipelines.model import identity
from pipelines.model.collectives import KINDS
from pipelines.model.machines import PATIENCE, Answer, Machines
from pipelines.site_settings import AcceptPart
from pipelines.stages import STAGES

FILE = "accept.json"


class Trial:
    """One acceptance: where it works, on which machines, what it found."""

    def __init__(self, context: artifacts.StageContext, machines: Machines | None = None) -> None:
        self.config, self.directory = context.config, context.directory.absolute()
        self.machines = machines or Machines()
        here = layout(context.config.parallel)
        several = here.processes if context.config.parallel.processes else here.processes * self.machines.size
        self.ranks = replace(here, processes=several)
        self.each = several // self.machines.size  # processes on each machine
        self.found: dict[str, Any] = {}

    def arguments(self, *overrides: str) -> list[str]:
        """Of Python, for `python -m pipelines` on these machines' devices, with runs in a directory of the trial's."""
        own = [f"run.directory={self.directory / 'runs'}", f"parallel.device={self.ranks.device}"]
        return ["-m", "pipelines", *overrides, *own, f"parallel.processes={self.ranks.processes}"]

    def run(self, *overrides: str) -> str:
        """What a command printed. On several machines each stage is started as a job of SLURM does it: with ranks by
        torchrun on all of them, without on the first. Raises UserError with its message where it failed."""
        if self.machines.size == 1:
            return self._checked(overrides, self.machines.run([self.arguments(*overrides)]), None)
        return "".join(self._stage(stage, *overrides) for stage in _stages(overrides))

    def _stage(self, stage: str, *overrides: str) -> str:
        own = (*(o for o in overrides if not o.startswith("stage=")), f"stage={stage}")
        if not STAGES[stage].ranks:
            return self._checked(own, Machines().run([self.arguments(*own)]), None)
        answers, verdict = self.on_all(self.arguments(*own))
        return self._checked(own, answers, verdict)

    def on_all(self, arguments: list[str], kill_after: Path | None = None) -> tuple[list[Answer], Path]:
        """torchrun with as many ranks as there are, on every machine; and where a rank left the reason of a failure."""
        several, verdict = self.machines, self.directory / "runs" / f"verdict-{time.time_ns()}.json"
        verdict.parent.mkdir(exist_ok=True)  # emptied when the next trial begins
        port = several.free_port()
        start = ["-m", "torch.distributed.run", f"--nnodes={several.size}", f"--nproc-per-node={self.each}"]
        start += [f"--master-addr={several.address}", f"--master-port={port}", f"--rdzv-id={verdict.stem}"]
        start += ["--max-restarts=0"]
        each = [[*start, f"--node-rank={machine}", *arguments] for machine in range(several.size)]
        return several.run(each, {stopping.VERDICT: str(verdict), "HF_HUB_OFFLINE": "1"}, kill_after), verdict

    def _checked(self, overrides: tuple[str, ...], answers: list[Answer], verdict: Path | None) -> str:
        failed = [answer for answer in answers if answer.code]
        if failed:
            one = next((answer for answer in failed if answer.first), failed[0])
            told = files.read_object(verdict)["message"] if verdict and verdict.is_file() else one.err
            raise UserError(
                f"accept: expected `{shown(overrides)}` to end well, found exit code {one.code}:\n"
                f"{told.strip()[-3000:]}"
            )
        return "".join(answer.out for answer in answers)


def _stages(overrides: tuple[str, ...]) -> list[str]:
    named = next(o for o in overrides if o.startswith("stage=")).removeprefix("stage=")
    return named.strip("[]").split(",")


def run(context: artifacts.StageContext) -> dict[str, Any]:
    """Raises UserError with the first part that fails; what was found so far stands in accept.json."""
    trial, started = Trial(context, Machines.joined()), time.monotonic()
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


def shown(overrides: tuple[str, ...]) -> str:
    return " ".join(["python -m pipelines", *overrides])


# The parts


def node(trial: Trial) -> dict[str, Any]:
    """The check of each machine by itself; of several the answers by their hosts."""
    gpus = trial.each if trial.ranks.device == "cuda" else 0
    arguments = ["-m", "pipelines.preflight", "--json", "--directory", str(trial.directory)]
    arguments += ["--gpus", str(gpus)] if gpus else []
    found, answers = [], trial.machines.run([arguments] * trial.machines.size)
    for done in sorted(answers, key=lambda answer: not (answer.code and answer.first)):
        answer: dict[str, Any] = json.loads(done.out) if done.out else {"checks": [], "fit": False, "host": "?"}
        bad = [f"{c['name']}: expected {c['expected']}, found {c['found']}" for c in answer["checks"] if not c["good"]]
        if not answer["fit"]:
            told = "\n  ".join(bad) or done.err[-2000:]
            raise UserError(f"accept: expected {answer['host']} to be fit, found:\n  {told}\nSee docs/site.md.")
        for check in answer["checks"]:
            console.say(f"accept    {answer['host']}  {check['name']}: {check['found']}")
        found.append(answer)
    return {"fit": True, "machines": found}


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
    if trial.machines.size > 1:
        file = trial.directory / "runs" / "bandwidth.json"
        file.parent.mkdir(exist_ok=True)
        arguments = [trial.ranks.device, ",".join(KINDS), ",".join(map(str, sizes)), str(file)]
        answers, _ = trial.on_all(["-m", "pipelines.model.collectives", *arguments])
        failed = next((answer for answer in answers if answer.code and answer.first), None)
        return _told(failed.err.strip()[-2000:] if failed else json.loads(file.read_text()))
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as place:
        found = preflight.exchanged(
            trial.ranks.device, trial.ranks.processes, Path(place), list(KINDS), sizes, PATIENCE
        )
    return _told(found)


def _told(found: list[dict[str, Any]] | str) -> list[dict[str, Any]]:
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


def small_run(processes: int, each: int) -> list[str]:
    """Overrides of the run that is killed, over so many processes, `each` of them on every machine."""
    # Eight heads to divide; what is left of the processes are replicas, so that machines hold whole ones.
    tensor = math.gcd(each, 8)
    replicas = processes // tensor
    batch = 2 * replicas * max(1, 8 // replicas)  # micro batches of two, near the experiment's 16
    batches = [f"teacher.global_batch_size={batch}", f"distil.global_batch_size={batch}"]
    return ["experiment=acceptance", f"parallel.tensor={tensor}", *batches]


def resume(trial: Trial) -> dict[str, Any]:
    """A run left alone, and one whose rank is killed after a checkpoint and that is started again: the same losses."""
    small = small_run(trial.ranks.processes, trial.each)
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
    """Start, SIGKILL the last rank once there is a checkpoint, wait for the end. The step of the newest row."""
    arguments, place = trial.arguments(*overrides), stage / "checkpoints"
    if trial.machines.size == 1:
        answers = trial.machines.run([arguments], kill_after=place)
    else:
        answers, _ = trial.on_all(arguments, kill_after=place)
    if not any(answer.killed for answer in answers):
        said = next((answer for answer in answers if answer.first and answer.code), answers[0]).err
        raise UserError(f"accept: expected a checkpoint to kill after, found none:\n{said[-3000:]}")
    if not all(answer.code for answer in answers):
        raise UserError("accept: expected a killed run to fail, found that it had ended. Start it again.")
    return max(losses(stage), default=0)


# What identifies the machine


def machine(trial: Trial) -> dict[str, Any]:
    """What identifies the machines; what differs between them stands side by side. Raises UserError where they do not
    run the same code, or do not see the same run directory."""
    found = [identity.identity(trial.ranks.device)]
    if trial.machines.size > 1:
        found = _of_several(trial)
    for name in ("git", "versions", "image"):
        if any(one[name] != found[0][name] for one in found):
            told = "; ".join(f"{one[name]} on {one['host']}" for one in found)
            raise UserError(f"accept: expected the same {name} on every machine, found {told}. Start the same image.")
    beside = {
        name: "; ".join(dict.fromkeys(one[name] for one in found))
        for name in ("device", "driver", "cuda", "interconnect")
        if name in found[0]
    }
    hosts = {"machines": trial.machines.size, "hosts": [one["host"] for one in found]}
    return found[0] | beside | hosts | {"processes": trial.ranks.processes}


def _of_several(trial: Trial) -> list[dict[str, Any]]:
    """Each asked by a process of its own, which looks for a file that the first has written."""
    with tempfile.NamedTemporaryFile(dir=trial.directory, prefix=".seen-") as seen:
        arguments = ["-m", "pipelines.model.identity", trial.ranks.device, seen.name]
        answers = trial.machines.run([arguments] * trial.machines.size)
    failed = next((answer for answer in answers if answer.code and answer.first), None)
    if failed:
        raise UserError(failed.err.strip()[-2000:])
    return [json.loads(answer.out) for answer in answers]


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
        _devices(here),
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


def _devices(here: dict[str, Any]) -> str:
    """8 x NVIDIA H100; 2 machines, 16 x NVIDIA H100; 2 machines, each 64 cores of a CPU"""
    several = here.get("machines", 1) > 1
    each = f"{'each ' if several else ''}{here['device']}"
    told = f"{here['processes']} x {here['device']}" if here["driver"] != "none" else each
    return f"{here['machines']} machines, {told}" if several else told
