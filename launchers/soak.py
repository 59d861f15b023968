"""Faults at random moments of a small distillation, again and again: does it end with what an uninterrupted one gives?

    python launchers/soak.py [--directory runs/soak] [--rounds 27] [--seed 1] [--kinds KIND ...] [--base RUN] \\
        [OVERRIDES ...]

Makes a corpus, a teacher and a pruned student of a few thousand parameters, or takes those of the finished run --base;
distils it once without interruption, then once more while each start meets a fault:

    rank     kill -9 of one rank
    command  kill -9 of python -m pipelines, whose ranks end with it
    all      kill -9 of every process at once, as a node that dies
    save     the same while a checkpoint is being written
    start    the same at a random moment between the start and the first step
    pause    SIGSTOP of one rank for some seconds, then SIGCONT: the run goes on, and meets kill -9 later
    stop     SIGUSR1: the run saves and ends with 75
    disk     the disk fills to its last byte; the run ends with one message, and room comes back
    corrupt  kill -9 of all, then one bit of the newest checkpoint is flipped, or a file of it cut short

Prints a table of what was injected and survived, the steps lost and the seconds to the first step after a restart,
writes it to <directory>/soak.json, and returns 1 where a promise of docs/faults.md was broken: losses and weights equal
bit by bit, no checkpoint lost that was there, the newest undamaged one continued from, at most checkpoint_interval
steps lost, once more unless distil.save_asynchronous=false, once more where one was damaged. The runs lie in
<directory>/disk, where a file system in memory is mounted for the time where this user may; where not, `disk` is left
out, and said so. OVERRIDES are settings of the distillation as python -m pipelines takes them, such as parallel=dp2 or
distil.save_asynchronous=false. Ctrl-C and SIGTERM end the training that is running, unmount, and remove the disk.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pipelines.processes import children, descendants  # noqa: E402
from pipelines.report.record import OF_THE_MACHINE  # noqa: E402
from pipelines.stopping import EXIT_STOPPED  # noqa: E402

KINDS = ("rank", "command", "all", "save", "start", "pause", "stop", "disk", "corrupt")
INTERVAL, KEEP = 10, 3
PER_ROUND = 40  # steps of the run for each round, of which a fault comes after 5 to 30
DISK = "192m"
PATIENCE = 900.0  # seconds that one start may take
SHAPE = {"vocab_size": 600, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TRAINING = {"sequence_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "warmup_steps": 2}
TRAINING |= {"validation_interval": 25, "validation_batches": 1}
TRAINING |= {"checkpoint_interval": INTERVAL, "keep_checkpoints": KEEP}


@dataclass
class Round:
    """One start. lost: steps between the last one logged before the restart and the checkpoint that it continued from;
    seconds: from the command to the end of the first step; broken: promises that were not kept."""

    kind: str
    code: int = 0
    logged: int = 0
    lost: int | None = None
    seconds: float | None = None
    broken: list[str] = field(default_factory=list)


class Soak:
    """Runs in `disk`, which `disk` may fill; `run` returns the rounds, and what the end is worth."""

    def __init__(
        self, disk: Path, base: Path | None, rounds: int, kinds: Sequence[str], seed: int, overrides: Sequence[str]
    ) -> None:
        self.directory, self.rounds, self.overrides = disk, rounds, list(overrides)
        self.output, self.base = disk.with_name("output"), base.resolve() if base else disk / "runs" / "base"
        self.random, self.kinds = random.Random(seed), list(kinds)
        self.steps, self.asynchronous = max(60, PER_ROUND * rounds), "distil.save_asynchronous=false" not in overrides
        self.distil = disk / "runs" / "soaked" / "distil"
        self.metrics, self.checkpoints = self.distil / "metrics.jsonl", self.distil / "checkpoints"
        self.damaged: set[str] = set()
        self.broken: list[str] = []  # what a fault has seen
        self.running: subprocess.Popen[str] | None = None  # the newest start

    def run(self) -> tuple[list[Round], list[str]]:
        if not (self.base / "prune" / "complete").exists():
            self._finished("base", "stage=[corpus,teacher,prune]")
        self._finished("whole", "stage=distil", *self._borrowed())
        rounds = []
        # Each kind comes about as often as any other, in a random order.
        turns = range(-(-self.rounds // len(self.kinds)))
        order = [kind for _ in turns for kind in self.random.sample(self.kinds, len(self.kinds))][: self.rounds]
        for number, kind in enumerate(order, 1):
            rounds.append(self._round(kind))
            print(f"round {number}: {describe(rounds[-1])}", flush=True)
        last = self._round("")
        print(f"last start: {describe(last)}", flush=True)
        return [*rounds, last], self._differences()

    # Runs

    def _command(self, name: str, *overrides: str) -> list[str]:
        settings = {"experiment": "quickstart", "run.directory": self.directory / "runs", "run.name": name}
        settings |= {f"model.shape.{key}": value for key, value in SHAPE.items()}
        settings |= {f"{stage}.{key}": value for stage in ("teacher", "distil") for key, value in TRAINING.items()}
        settings |= {"teacher.steps": 60, "teacher.learning_rate": 1e-2, "distil.steps": self.steps}
        settings |= {"student.hidden_size": 32, "student.intermediate_size": 48}
        settings |= {"prune.sequence_length": 32, "prune.calibration_samples": 16}
        given = [f"{key}={value}" for key, value in settings.items()]
        given.append("data.sources=[{kind: standard_library, limit_bytes: 1500000}]")
        return [sys.executable, "-m", "pipelines", *given, *overrides]

    def _borrowed(self) -> list[str]:
        paths = {"data.corpus": self.base / "corpus", "model.path": self.base / "teacher" / "hf"}
        paths |= {"student.path": self.base / "prune" / "hf"}
        return ["teacher.mode=take", *(f"{key}={path}" for key, path in paths.items()), *self.overrides]

    def _start(self, name: str, *overrides: str) -> "subprocess.Popen[str]":
        # To a file: nobody reads while the run is being killed. And not on the disk that fills.
        with open(self.output, "w") as output:
            self.running = subprocess.Popen(
                self._command(name, *overrides), cwd=ROOT, text=True, stdout=output, stderr=subprocess.STDOUT
            )
        return self.running

    def end(self) -> None:
        """No process of the newest start is left."""
        if self.running is not None and self.running.poll() is None:
            self._kill(descendants(self.running.pid))
            self.running.wait()

    def _finished(self, name: str, *overrides: str) -> None:
        started = time.monotonic()
        process = self._start(name, *overrides)
        if process.wait(PATIENCE):
            raise SystemExit(f"{name} did not end well:\n{self._output()}")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)

    def _output(self) -> str:
        return self.output.read_text(errors="replace")

    # One start, with a fault or, of no kind, without

    def _round(self, kind: str) -> Round:
        found, self.broken = Round(kind or "none"), []
        before, logged, starts = self._whole(), self._logged(), self._first_steps()
        process = self._start("soaked", "stage=distil", *self._borrowed())
        try:
            if kind:
                getattr(self, f"_inject_{'all' if kind == 'corrupt' else kind}")(process, logged)
            found.code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            found.broken.append("it neither went on nor ended")
            self._kill(descendants(process.pid))
            found.code = process.wait()
        (self.directory / "filler").unlink(missing_ok=True)
        found.logged = self._logged()
        found.broken += self.broken
        self._judge(found, kind, before, logged)
        found.seconds = next(iter(self._first_steps() - starts), None)
        if kind == "corrupt":
            self._damage()
        return found

    def _judge(self, found: Round, kind: str, before: list[str], logged: int) -> None:
        """before: the checkpoints when it started; logged: the last step then."""
        expected, output = [name for name in before if name not in self.damaged], self._output()
        if "finished already" in output:
            return found.broken.append("the run had come to its end before: give it more steps for each round")
        told = re.search(r"continues from \S*?(step-\d+)", output)
        if expected and told:
            if told[1] != expected[-1]:
                found.broken.append(f"it continued from {told[1]}, and {expected[-1]} was whole")
            found.lost = logged - int(told[1].removeprefix("step-"))
            bound = INTERVAL * (1 + self.asynchronous + bool(self.damaged & set(before)))
            if not 0 <= found.lost <= bound:
                found.broken.append(f"{found.lost} steps were lost, more than {bound}")
            self.damaged.clear()  # it has moved them aside
        elif expected and kind != "start":
            found.broken.append("it did not say that it continued")
        now = self._whole()
        lost = [name for name in expected[-KEEP:] if name not in now and sum(n > name for n in now) < KEEP]
        if lost:
            found.broken.append(f"checkpoints were there and are gone: {', '.join(lost)}")
        codes = {"": (0,), "stop": (EXIT_STOPPED, 0), "disk": (2,)}.get(kind, (1, -signal.SIGKILL))
        if found.code not in codes and not (self.distil / "complete").exists():
            found.broken.append(f"it ended with {found.code}:\n{output[-2000:]}")

    def _first_steps(self) -> set[float]:
        """seconds_to_first_step of every start so far."""
        return {row["seconds_to_first_step"] for row in read_rows(self.metrics) if "seconds_to_first_step" in row}

    # Faults: each returns once it has done its part, the process may still be ending

    def _inject_rank(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        self._kill(self.random.sample(self._ranks(process), 1))

    def _inject_command(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        left = descendants(process.pid)[1:]
        self._kill([process.pid])
        deadline = time.monotonic() + 120
        while any(is_running(pid) for pid in left) and time.monotonic() < deadline:
            time.sleep(0.05)
        if running := [pid for pid in left if is_running(pid)]:
            self.broken.append(f"{len(running)} processes went on without the command")
            self._kill(running)

    def _inject_all(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        self._kill(descendants(process.pid))

    def _inject_save(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        self._until(process, lambda: any(self.checkpoints.glob("partial-*")))
        time.sleep(self.random.uniform(0, 0.05))
        self._kill(descendants(process.pid))

    def _inject_start(self, process: "subprocess.Popen[str]", logged: int) -> None:
        time.sleep(self.random.uniform(0.1, 15))
        self._kill(descendants(process.pid))

    def _inject_pause(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        for pid in self.random.sample(self._ranks(process), 1):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                time.sleep(self.random.uniform(1, 5))
                os.kill(pid, signal.SIGCONT)
        self._after_steps(process, self._logged())
        self._kill(descendants(process.pid))

    def _inject_stop(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        process.send_signal(signal.SIGUSR1)

    def _inject_disk(self, process: "subprocess.Popen[str]", logged: int) -> None:
        self._after_steps(process, logged)
        leave = self.random.choice((0, 100_000))  # room for no row, or for rows and no checkpoint
        with open(self.directory / "filler", "wb", buffering=0) as filler, suppress(OSError):
            while process.poll() is None:
                status = os.statvfs(self.directory)
                if (free := status.f_bavail * status.f_frsize - leave) > 0:
                    filler.write(bytes(min(free, 1 << 22)))
                else:
                    time.sleep(0.01)

    def _damage(self) -> None:
        whole = [name for name in self._whole() if name not in self.damaged]
        if len(whole) < 2:
            return  # a run with none but damaged checkpoints refuses to begin again
        files = [path for path in (self.checkpoints / whole[-1]).rglob("*") if path.suffix in (".distcp", ".pt")]
        file = self.random.choice(sorted(files))
        content = bytearray(file.read_bytes())
        if self.random.random() < 0.5:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        else:
            del content[self.random.randrange(len(content)) :]
        file.write_bytes(content)
        self.damaged.add(whole[-1])

    # Looking on

    def _after_steps(self, process: "subprocess.Popen[str]", logged: int) -> None:
        """Wait for a random number of steps more than were logged, and on into the middle of one."""
        goal = min(logged + self.random.randint(5, 30), self.steps - 2)
        self._until(process, lambda: self._logged() >= goal)
        time.sleep(self.random.uniform(0, 0.1))

    def _until(self, process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not condition():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, PATIENCE)
            time.sleep(0.005)

    def _whole(self) -> list[str]:
        """Names of the checkpoints that are reported as saved, oldest first."""
        return sorted(path.name for path in self.checkpoints.glob("step-*"))

    def _logged(self) -> int:
        return max((row["step"] for row in read_rows(self.metrics)), default=0)

    def _ranks(self, process: "subprocess.Popen[str]") -> list[int]:
        """torchrun's children."""
        return [pid for runner in children(process.pid) for pid in children(runner)]

    def _kill(self, pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _differences(self) -> list[str]:
        """Between the run that met the faults and the one that did not."""
        found, whole = [], self.directory / "runs" / "whole" / "distil"
        mine, theirs = (
            [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in read_rows(place / "metrics.jsonl")]
            for place in (self.distil, whole)
        )
        if mine != theirs:
            first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
            found.append(f"metrics.jsonl differs: {len(mine)} and {len(theirs)} rows, first in row {first}")
        for file in sorted((whole / "hf").glob("*.safetensors")):
            copy = self.distil / "hf" / file.name
            if not copy.exists() or copy.read_bytes() != file.read_bytes():
                found.append(f"{file.name} differs")
        return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # a row that is being written, or that a kill has cut
            rows.append(json.loads(line))
    return rows


def is_running(pid: int) -> bool:
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


# What is told


def describe(found: Round) -> str:
    lost = "" if found.lost is None else f", {found.lost} steps lost"
    seconds = "" if found.seconds is None else f", first step after {found.seconds:.1f} s"
    return f"{found.kind}, ended with {found.code} at step {found.logged}{lost}{seconds}" + "".join(
        f"; BROKEN: {one}" for one in found.broken
    )


def table(rounds: Sequence[Round]) -> str:
    """One line for each kind of fault; the loss and the seconds are those of the start that follows it."""
    lines = [
        "| fault | injected | survived | steps lost, most | seconds to the first step, median (most) |",
        "|---|---|---|---|---|",
    ]
    followed = list(zip(rounds[:-1], rounds[1:], strict=True))
    for kind in [*KINDS, "all together"]:
        pairs = [(one, after) for one, after in followed if kind in (one.kind, "all together")]
        if not pairs:
            continue
        survived = sum(not one.broken and not after.broken for one, after in pairs)
        lost = [after.lost for _, after in pairs if after.lost is not None]
        seconds = [after.seconds for _, after in pairs if after.seconds is not None]
        shown = f"{statistics.median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""
        lines.append(f"| {kind} | {len(pairs)} | {survived} | {max(lost) if lost else ''} | {shown} |")
    return "\n".join(lines)


def mounted(directory: Path) -> bool:
    """Whether a file system in memory could be mounted there."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(directory)]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    return False


def cleared(disk: Path) -> None:
    """What a soak has left there, and its mount where a kill -9 has left that too, are gone."""
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=False)
    shutil.rmtree(disk, ignore_errors=True)


def count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return number


def interrupt(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/soak"), help="of the runs and soak.json")
    parser.add_argument("--rounds", type=count, default=3 * len(KINDS), help="starts that meet a fault")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the order of the faults")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of faults; all")
    parser.add_argument("--base", type=Path, help="a finished run of teacher and prune; none: one is made")
    options, overrides = parser.parse_known_args(arguments)
    if wrong := [word for word in overrides if "=" not in word or word.startswith("-")]:
        parser.error(f"{wrong[0]}: expected key=value of the distillation, as in parallel=dp2")
    disk = (options.directory / "disk").resolve()
    cleared(disk)  # of an earlier soak
    disk.mkdir(parents=True)
    signal.signal(signal.SIGTERM, interrupt)
    soak = Soak(disk, options.base, options.rounds, options.kinds, options.seed, overrides)
    try:
        if not mounted(disk):
            soak.kinds = [kind for kind in options.kinds if kind != "disk"]
        if soak.kinds != options.kinds:
            print("disk: left out, for want of a file system of its own that may be filled")
        rounds, differences = soak.run()
    except (KeyboardInterrupt, SystemExit):
        soak.end()
        cleared(disk)
        raise
    finally:
        if disk.is_mount():
            subprocess.run(["umount", "-l", str(disk)], check=False)
    print(f"\n{table(rounds)}\n")
    print(differences or "losses and weights equal those of the uninterrupted run bit by bit")
    result = {"rounds": [asdict(one) for one in rounds], "differences": differences}
    (options.directory / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    return 1 if differences or any(found.broken for found in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
