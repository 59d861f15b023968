"""Stages without models for chains on the tests' SLURM: a sitecustomize.py that every process of a job loads.

The file play.json beside it says what each stage does; without a word it writes a result and ends well. `train` makes
steps and checkpoints as a training does, stops as asked, and does to itself what `fault` says, once unless `always`. A
stage waits for the file `until`.
"""

import json
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

PLAY = Path(__file__).with_name("play.json")


def run(context):  # type: ignore[no-untyped-def]
    from pipelines.config import UserError

    rank, directory = int(os.environ.get("RANK", "0")), Path(context.directory)
    play = json.loads(PLAY.read_text()).get(context.stage, {})
    note(directory, "starts", f"{rank} of {os.environ.get('WORLD_SIZE', '1')} on {os.environ['SLURMD_NODENAME']}")
    if play.get("fault") == "user":
        raise UserError("data.sources: expected text, found none. Give some.")
    if play.get("fault") == "ours":
        raise RuntimeError("our own fault")
    while (awaited := play.get("until")) and not os.path.exists(awaited):
        time.sleep(0.2)
    if steps := play.get("steps", 0):
        train(directory, rank, steps, play)
    if rank == 0:
        (directory / "hf").mkdir(exist_ok=True)
        (directory / "hf" / "model.safetensors").write_text(context.stage)
    return {"rank": rank}


def train(directory: Path, rank: int, steps: int, play: dict[str, object]) -> None:
    from pipelines import stopping

    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    done = max((int(p.name[5:]) for p in checkpoints.glob("step-*")), default=0)
    note(directory, "from", f"{rank}: {done}")
    while done < steps:
        together(directory, rank, done, stopping.asked)
        if stopping.asked() and not play.get("deaf"):
            (checkpoints / f"step-{done:07}").mkdir(exist_ok=True)
            raise stopping.Stopped(f"stopped as asked after step {done}; the same command continues.")
        time.sleep(0.1)
        done += 1
        if done % 10 == 0 and not play.get("unsaved"):
            (checkpoints / f"step-{done:07}").mkdir(exist_ok=True)
        if rank == 1 and done == 12 and play.get("fault") == "kill" and (play.get("always") or first(directory)):
            os.kill(os.getpid(), signal.SIGKILL)


def together(directory: Path, rank: int, done: int, asked: Callable[[], bool]) -> None:
    """No rank is ahead of another, as in a training; one that has gone is waited for until a launcher ends the wait."""
    place = directory / "logs"
    place.mkdir(exist_ok=True)
    attempt = Path(os.environ["STILLHOUSE_STOP_FILE"]).name
    (place / f"{attempt}.{rank}.{done}").touch()
    others = [r for r in range(int(os.environ["WORLD_SIZE"])) if r != rank]
    while not asked() and not all((place / f"{attempt}.{other}.{done}").exists() for other in others):
        time.sleep(0.02)


def first(directory: Path) -> bool:
    """Whether this is asked for the first time of a stage's directory."""
    try:
        (directory / "checkpoints" / ".fault").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def note(directory: Path, name: str, line: str) -> None:
    with open(directory.parent / f"{directory.name}.{name}", "a") as file:
        file.write(line + "\n")


if PLAY.exists():
    for stage in ("corpus", "teacher", "prune", "distil"):
        module = types.ModuleType(f"pipelines.stages.{stage}")
        module.run = run  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
