"""One stage in processes of its own: torchrun where it needs ranks, a plain Python elsewhere. Imports no torch, but in
ranks that torchrun has started on several nodes.

The parent composes and validates, and stays light; the children do the work. A child that fails leaves a file in the
exchange directory, from which the parent prints one message. Rank 0 of the children owns the stage's directory (lock,
manifest, marker); the other ranks wait for its word.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines import artifacts, console, gates, interpreter, processes, stopping
from pipelines.config import Config, UserError, layout
from pipelines.failures import of_the_machine
from pipelines.files import disk_error
from pipelines.stages import STAGES
from pipelines.stopping import EXCHANGE, EXIT_STOPPED, Stopped

# nvidia-resiliency-ext asks for pynvml beside nvidia-ml-py, which has the same module: torch warns in each process.
QUIET = "ignore:The pynvml package is deprecated:FutureWarning"
ENDED = 130  # the exit code after Ctrl-C or SIGTERM
PATIENCE = 45.0  # seconds that a child gets to end by itself; torchrun gives its ranks 30 before it kills them


class StageFailed(Exception):
    """A stage ended with a message that is already complete. code: the exit code of the command."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def is_child() -> bool:
    """Whether this process is to run one stage itself: our own child, or a rank that torchrun or srun started."""
    return EXCHANGE in os.environ or "WORLD_SIZE" in os.environ


# The parent


def run_stage(config: Config, stage: str, overrides: list[str]) -> None:
    """Run one stage in child processes and wait. Raises StageFailed with what the children left to say, and Stopped
    where the command was asked to stop before the stage began."""
    log = artifacts.log_file(config, stage)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.directory={config.run.directory}: expected a place to write, found: {error}.") from None
    start_of_log = log.stat().st_size if log.exists() else 0
    count = layout(config.parallel).processes if STAGES[stage].ranks else 1
    exchange = Path(tempfile.mkdtemp(prefix="stillhouse-"))
    stopping.listen(exchange)
    try:
        refuse_when_asked(stage)
        with open(log, "a") as stderr:
            child = subprocess.Popen(
                command(stage, count, overrides),
                env=environment(count, exchange),
                stderr=stderr,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the children in order
                preexec_fn=processes.end_with_parent,
            )
        code = _wait(child)
        if code:
            raise _failure(exchange, log, start_of_log, code)
    finally:
        shutil.rmtree(exchange, ignore_errors=True)


def refuse_when_asked(stage: str) -> None:
    """Raises Stopped where this process was asked to stop before the stage has begun."""
    if stopping.asked():
        raise Stopped(f"stopped as asked before {stage} began; the same command continues.")


def command(stage: str, count: int, overrides: list[str]) -> list[str]:
    own = [o for o in overrides if not re.match(r"\+*stage=", o)]
    start = [sys.executable]
    if STAGES[stage].ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc-per-node={count}"]
    return [*start, "-m", "pipelines", *own, f"stage={stage}"]


def environment(count: int, exchange: Path) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // count)
    defaults = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": QUIET}
    return {**defaults, **os.environ, EXCHANGE: str(exchange), processes.STARTED: str(time.time())}


def _wait(child: "subprocess.Popen[bytes]") -> int:
    """The child's exit code. Ctrl-C and SIGTERM end the child first, then raise StageFailed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return child.wait()
    except KeyboardInterrupt:
        _end(child)
        raise StageFailed("interrupted; the same command continues where the stage left off", ENDED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(child: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)  # torchrun passes SIGTERM on to the ranks
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(PATIENCE)
            return


def _failure(exchange: Path, log: Path, start_of_log: int, code: int) -> StageFailed:
    """The one thing to say: a stop or a user's mistake before our own failure, the first failure before those that
    follow it."""
    failures = []
    for file in exchange.glob("failure-*.json"):
        with contextlib.suppress(json.JSONDecodeError):
            failures.append(json.loads(file.read_text()))
    # torchrun ends the ranks that are left with SIGTERM: those did not fail first
    failures.sort(key=lambda failure: (not failure["user"], failure["code"] == ENDED, failure["time"]))
    if failures and failures[0]["user"]:
        return StageFailed(failures[0]["message"], failures[0]["code"])
    if failures and failures[0]["code"] != ENDED:
        return StageFailed(f"{failures[0]['message'].rstrip()}\nlog: {log}", failures[0]["code"])
    text = log.read_bytes()[start_of_log:].decode(errors="replace")
    ended = sorted((int(n) for n in re.findall(r"exitcode\s*:\s*(-\d+)", text)), key=lambda n: n == -signal.SIGTERM)
    if (killed := (ended or [code])[0]) < 0:
        name = signal.Signals(-killed).name
        memory = ", often because the machine's memory was full" if -killed == signal.SIGKILL else ""
        return StageFailed(f"a process was ended by {name}{memory}; the same command continues.\nlog: {log}", 1)
    if failures:
        return StageFailed(f"{failures[0]['message']}\nlog: {log}", ENDED)
    tail = "\n".join(text.splitlines()[-15:])
    return StageFailed(f"the stage ended with exit code {code}:\n{tail}\nlog: {log}", 1)


# A child


@dataclass
class Exchange:
    """Where the processes of one stage leave each other word."""

    directory: Path
    ours: bool  # started by a parent of ours, which reads the failures

    @classmethod
    def of(cls, config: Config, stage: str) -> "Exchange":
        if EXCHANGE in os.environ:
            return cls(Path(os.environ[EXCHANGE]), ours=True)
        names = ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID"]
        names += ["SLURM_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"]
        parts = [os.environ.get(name, "") for name in names]
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            parts.append(str(os.getppid()))  # one launcher for all: tells two attempts of a bare torchrun apart
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            parts.append(interpreter.load("pipelines.model.start").name())
        attempt = re.sub(r"[^\w.-]", "_", "-".join(parts))
        return cls(artifacts.run_directory(config) / "logs" / f".{stage}-{attempt}", ours=False)

    def tell(self, word: str) -> None:
        """Rank 0's word stays for ranks that come late; the words of earlier attempts go."""
        self.directory.mkdir(parents=True, exist_ok=True)
        artifacts.write_atomic(self.directory / "word", word)
        if not self.ours:
            for earlier in self.directory.parent.glob(self.directory.name.split("-")[0] + "-*"):
                if earlier != self.directory:
                    shutil.rmtree(earlier, ignore_errors=True)

    def listen(self) -> str:
        """Rank 0's word: "run", "finished" or "stopped". Where rank 0 fails, the launcher ends this process."""
        while not (self.directory / "word").is_file():
            time.sleep(0.1)
        return (self.directory / "word").read_text()

    def fail(self, failure: dict[str, Any]) -> None:
        if self.ours:
            artifacts.write_json(self.directory / f"failure-{console.rank()}.json", failure)

    def end_together(self) -> None:
        """Rank 0 leaves first: a launcher ends the others as soon as one has ended, whatever they were closing."""
        if console.rank() == 0:
            (self.directory / "ended").touch()
            return
        deadline = time.monotonic() + PATIENCE
        while not (self.directory / "ended").exists() and time.monotonic() < deadline:
            time.sleep(0.1)


def work(config: Config, stage: str) -> int:
    """Run one stage in this process, one rank of it, and return the exit code."""
    exchange = Exchange.of(config, stage)
    if exchange.ours:
        processes.end_with_parent()
    terminal = os.fdopen(os.dup(2), "w") if not exchange.ours else None
    if console.rank() and not STAGES[stage].ranks:
        return 0
    try:
        console.capture(artifacts.log_file(config, stage))
        _work(config, stage, exchange)
        if not exchange.ours and console.rank() == 0 and STAGES[stage].kept:  # a parent of ours judges them itself
            gates.check(config, stage)
        return 0
    except BaseException as error:
        failure = describe_failure(error)
        # The word to the parent first: on a full disk the log can take nothing more.
        with contextlib.suppress(OSError):
            exchange.fail(failure)
        with contextlib.suppress(OSError):
            traceback.print_exc()  # into the log
        if not of_the_machine(error) and not ended_from_outside(error):
            stopping.leave_verdict(int(failure["code"]), failure["message"], stage)
        stopped = isinstance(error, Stopped)
        if terminal is not None and (console.rank() == 0 or not stopped):
            print(failure["message"], file=terminal, flush=True)
        if stopped:
            exchange.end_together()
        return int(failure["code"])
    finally:
        os.environ[processes.STARTED] = str(time.time())  # of the next stage, where this process runs several


def tell_parent(error: BaseException) -> None:
    """What a process found before its stage began, to our own parent and to whoever asked for a verdict."""
    failure = describe_failure(error)
    stopping.leave_verdict(int(failure["code"]), failure["message"], "")
    if EXCHANGE in os.environ:
        with contextlib.suppress(OSError):
            Exchange(Path(os.environ[EXCHANGE]), ours=True).fail(failure)


def _work(config: Config, stage: str, exchange: Exchange) -> None:
    context = artifacts.StageContext(config, stage, artifacts.stage_directory(config, stage))
    attempt = None
    if console.rank() == 0:
        finished = STAGES[stage].kept and artifacts.examine(config, STAGES[stage]).state is artifacts.State.finished
        if finished:  # the parent looks before it starts ranks; ranks that others started look here
            console.say(f"{stage}: finished already in {context.directory}")
            return exchange.tell("finished")
        if stopping.asked():
            exchange.tell("stopped")
        refuse_when_asked(stage)
        attempt = artifacts.begin(config, stage, console.say)
        exchange.tell("run")
    elif (word := exchange.listen()) == "finished":
        return
    elif word == "stopped":
        raise Stopped(f"stopped as asked before {stage} began; the same command continues.")
    # fp32 means fp32: NVIDIA's images and Transformer Engine multiply in TF32 unless told so before torch is loaded.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    try:
        figures = interpreter.load(f"pipelines.stages.{stage}").run(context)
        if attempt is not None:
            attempt.finish(figures)
    finally:
        if attempt is not None:
            attempt.release()


def ended_from_outside(error: BaseException) -> bool:
    """Whether a SIGTERM ended the process: in a training Lightning takes it and raises, behind the step, a SystemExit
    that has no code. A rank that it has ended leaves no verdict, like one that is killed."""
    return isinstance(error, SystemExit) and error.code is None


def describe_failure(error: BaseException) -> dict[str, Any]:
    """What the parent prints: a message for a stop, a user's mistake or a full disk, the traceback for our failure."""
    failure: dict[str, Any] = {"user": True, "time": time.time(), "code": 2, "message": str(error)}
    if ended_from_outside(error):
        message = "a process was ended by SIGTERM; the same command continues."
        return failure | {"user": False, "code": ENDED, "message": message}
    if isinstance(error, SystemExit):  # a stage's own verdict: a message, or a code after it has printed its reasons
        code = error.code if isinstance(error.code, int) else 1
        return failure | {"code": code, "message": "" if isinstance(error.code, int) else str(error.code)}
    if isinstance(error, Stopped):
        return failure | {"code": EXIT_STOPPED}
    if isinstance(error, UserError):
        return failure
    if found := disk_error(error):
        message = f"{found}: expected room to write. Free some space and start the same command again; it continues."
        return failure | {"message": message}
    text = "".join(traceback.format_exception(error))
    if machine := of_the_machine(error):
        text = f"{text.rstrip()}\n{machine} failed, not the run: the same command continues, from the last checkpoint "
        text += "where the stage writes any.\n"
    return failure | {"user": False, "code": 1, "message": text}
