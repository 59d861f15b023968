"""Training checkpoints: written whole or not at all, and only continued from when they are what was written.

checkpoints/step-NNNNNNN   a NeMo distributed checkpoint with about.json (step and validation loss), and sizes.json and
                           checksums.json of its files
checkpoints/partial-...    one that a kill or a full disk cut short; removed by the next save
checkpoints/damaged-...    one whose files have changed since; moved aside, never read again, left to the user
"""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch.callbacks import Checkpoint

from pipelines import console, files, stopping
from pipelines.config import UserError
from pipelines.failures import of_the_machine
from pipelines.model import parallel
from pipelines.stopping import Stopped
from pipelines.trainer.background_write import Write
from pipelines.trainer.finite import SharedError, refuse_non_finite
from pipelines.trainer.room import refuse_without_room, trained_values

CHECKPOINT = "step-{:07d}"
_PARTIAL, _DAMAGED = "partial-", "damaged-"
SIZES, _CHECKSUMS = "sizes.json", "checksums.json"
_RECORDS = (SIZES, _CHECKSUMS)
_ABOUT = "about.json"
_LEAVES = 5.0  # seconds that a rank which ends in an error of its own leaves to its thread
_SEEN = 120.0  # seconds in which a node must see what others have written: twice what NFS keeps by default

T = TypeVar("T")


class Checkpoints(Checkpoint):
    """Saves every `interval` steps, at the end, and where the run stops as asked, into `directory`/step-NNNNNNN, and
    keeps the last `keep` and, of those with a validation, the `best` with the lowest loss.

    asynchronous: the files are written while the next steps are taken. The checkpoint gets its name, and the old ones
    go, in the first step that finds every rank's files written, in the main thread; at the latest before the next save
    begins. At the end, at a stop, and at an error that all ranks share, the run waits for it; the last step's is waited
    for too. writes: whether any rank was still writing when the step that has just been taken was judged, the same on
    every rank.

    bytes_per_value: of the first checkpoint, for each number that is trained. validation: the figures of the last one.
    seconds: for which saving has held up the training since this start.

    stops: whether the run ends with the step that has just been taken, the same on every rank. Then Stopped is raised
    once the checkpoint is whole, after the validation where one belongs to this step.

    A checkpoint is written under another name, synced to disk, and renamed when it is whole, so that every step-NNNNNNN
    can be loaded. It holds weights, optimizer, schedule and position in the data as NeMo distributed checkpoints, which
    load at any other layout; no classes are stored.
    """

    def __init__(
        self,
        directory: Path,
        *,
        interval: int,
        keep: int,
        best: int,
        steps: int,
        bytes_per_value: int,
        asynchronous: bool,
        writes: Callable[[], bool],
        stops: Callable[[], bool],
        validation: Callable[[], dict[str, float]],
    ) -> None:
        self.directory, self.interval, self.keep, self.best, self.steps = directory, interval, keep, best, steps
        self.bytes_per_value, self.stops, self.validation = bytes_per_value, stops, validation
        self.asynchronous, self.writes = asynchronous, writes
        self.seconds = 0.0
        self._measured = False  # whether a save of this start has been held to the time that a stop leaves
        self._begun: _Begun | None = None

    def is_writing(self) -> bool:
        """This rank, at this moment."""
        return self._begun is not None and self._begun.write.goes_on()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Lightning counts a step as completed after `on_train_batch_end`: resumed from a checkpoint that was written
        # there, its count of batches would be one behind.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        progress.current.completed = progress.total.completed = trainer.global_step
        self._expected = self.bytes_per_value * trained_values(pl_module)
        if trainer.global_step < self.steps:  # now, and not after the hours up to the first save
            parallel.on_first_rank(self._refuse_without_room)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        # Where a validation follows, its figures belong to the checkpoint: a resumed run does not repeat it.
        if not trainer.fit_loop.epoch_loop.validates():
            self._save(trainer, None)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, self.validation()["loss"])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._begun is None:
            return
        if isinstance(exception, SharedError):  # of every rank, which all come here
            try:
                self._commit()
            except UserError as error:
                console.say(str(error))
        else:
            # What it writes is thrown away; a file system that hangs must not hold a rank whose peers have gone.
            self._begun.write.wait(_LEAVES)

    def _save(self, trainer: Any, loss: float | None) -> None:
        """loss: of the validation at this step, where there was one. Two barriers, an all-reduce and an all-gather over
        all ranks beside Megatron's own collectives; none in a step that neither begins nor ends a save."""
        step, stops = trainer.global_step, self.stops()
        due = not step % self.interval or step == self.steps or stops
        ended = self._begun is not None and (due or not self.writes())
        if not due and not ended:
            return
        started = time.monotonic()
        if ended:
            self._commit()
        if due:
            waits = not self.asynchronous or step == self.steps or stops
            self._begin(trainer, step, loss, waits)
            if waits:
                self._commit()
        self.seconds += time.monotonic() - started
        if stops and step != self.steps:
            whole = self.directory / CHECKPOINT.format(step)
            raise Stopped(
                f"stopped as asked at step {step} of {self.steps}: {whole} is whole, and the same command continues "
                "from it."
            )

    def _begin(self, trainer: Any, step: int, loss: float | None, waits: bool) -> None:
        weights = trainer.lightning_module.parameters()
        finite = all(bool(torch.isfinite(weight).all()) for weight in weights if weight.requires_grad)
        refuse_non_finite({"weight": finite}, step)
        partial, started = self.directory / (_PARTIAL + CHECKPOINT.format(step)), time.monotonic()
        with self._room_mended():
            parallel.on_first_rank(self._refuse_without_room)
            trainer.save_checkpoint(partial)
            write = Write(trainer.strategy.checkpoint_io.take(), partial, copies=not waits)
            self._begun = _Begun(step, loss, write, started)

    def _commit(self) -> None:
        """Give what was begun its name, once every rank has written its files. Every rank calls it."""
        assert self._begun is not None
        begun, self._begun = self._begun, None
        begun.write.wait()
        with self._room_mended():
            written = _gathered(begun.write.written, begun.write.error)
            begun.write.record()
            parallel.on_first_rank(lambda: self._finish(begun, written))

    @contextmanager
    def _room_mended(self) -> Iterator[None]:
        """An error that is a full disk's in the user's words, and the room that the save took given back."""
        try:
            yield
        except BaseException as error:  # which torch's CheckpointException is
            if console.rank() == 0:
                with suppress(OSError):
                    self._clear()  # the room it took is wanted
            if found := files.disk_error(error):
                raise UserError(
                    f"{self.directory}: expected room for a checkpoint, found: {found}. Free some space and start the "
                    "same command again; it continues from the last checkpoint."
                ) from error
            raise

    def _clear(self) -> None:
        for left_over in self.directory.glob(_PARTIAL + "*"):
            shutil.rmtree(left_over)

    def _refuse_without_room(self) -> None:
        """What the newest checkpoint takes, or the first one will, must fit beside those that are kept."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clear()  # the room that a save took which was cut short; none is being written now
        whole = whole_checkpoints(self.directory)
        refuse_without_room(self.directory, sum(sizes(whole[-1]).values()) if whole else self._expected)

    def _finish(self, begun: "_Begun", written: dict[str, tuple[int, int]]) -> None:
        """On rank 0. written: (bytes, CRC-32) of the ranks' files; the rest is Megatron's and ours, from this rank."""
        partial = begun.write.directory
        _wait_for({partial / name: size for name, (size, _) in written.items()})
        checksums = {name: checksum for name, (_, checksum) in written.items()}
        files.write_json(partial / _ABOUT, {"step": begun.step, "validation_loss": begun.loss})
        rest = [name for name in sizes(partial) if name not in checksums]
        files.sync_files(partial / name for name in rest)
        files.write_json(partial / _CHECKSUMS, checksums | {name: files.crc32(partial / name) for name in rest})
        files.write_json(partial / SIZES, sizes(partial))
        os.replace(partial, self.directory / CHECKPOINT.format(begun.step))
        files.sync_directory(self.directory)
        if not self._measured:
            self._measured = True
            if warning := short_grace(time.monotonic() - begun.started, os.environ.get(stopping.GRACE, "")):
                console.say(f"warning: {warning}")
        for old in surplus(whole_checkpoints(self.directory), self.keep, self.best):
            # A kill in the middle of a removal leaves nothing that looks damaged.
            shutil.rmtree(old.rename(old.with_name(_PARTIAL + old.name)))


@dataclass
class _Begun:
    """A checkpoint on its way. loss: of the validation at its step, where there was one. started: by the clock of
    time.monotonic."""

    step: int
    loss: float | None
    write: Write
    started: float


def short_grace(seconds: float, grace: str) -> str:
    """A warning where a job's grace period is shorter than two saves: the one that is being written when the job is
    asked to stop, and that of the last step. seconds: from the beginning of a save until it was whole. grace: in
    seconds, as the job says it; empty outside of jobs."""
    if not grace.isdecimal() or int(grace) >= 2 * seconds:
        return ""
    return (
        f"a checkpoint took {seconds:,.1f} s, and the job leaves {grace} s (cluster.grace_seconds) from being asked to "
        f"stop to the end of its processes: less than two of them may take. Set cluster.grace_seconds to "
        f"{math.ceil(2 * seconds):,} or more, and cluster.warning_seconds above it."
    )


def _gathered(own: dict[str, T], error: str = "") -> dict[str, T]:
    """What all ranks have of their files, by name. error: why this one could not write them; where one has an error,
    every rank raises. One all-gather."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (error, own))
    if failed := [f"rank {rank} has not written its files:\n{told}" for rank, (told, _) in enumerate(everyone) if told]:
        raise RuntimeError("\n".join(failed))
    return {name: value for _, part in everyone for name, value in part.items()}


def _wait_for(expected: dict[Path, int]) -> None:
    """Until this node sees the files, with these sizes, that the ranks of all nodes have written and synced.

    A network file system shows another node's files when what it keeps of their directory has grown old, a minute at
    the most by NFS's defaults. Raises OSError, a stale file handle, where that does not come to pass.
    """
    deadline = time.monotonic() + _SEEN
    while missing := sorted(str(path) for path, size in expected.items() if not _is_there(path, size)):
        if time.monotonic() > deadline:
            reason = f"{os.strerror(errno.ESTALE)}: written by another node, and not seen here after {_SEEN:g} s"
            raise OSError(errno.ESTALE, reason, missing[0])
        time.sleep(0.1)
        for directory in {path.parent for path in expected}:
            os.listdir(directory)  # which makes NFS look again


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def surplus(whole: list[Path], keep: int, best: int) -> list[Path]:
    """Of whole checkpoints, oldest first, those that are neither among the last nor among the best; of equal losses the
    older one is better."""
    losses = {path: loss for path in whole if (loss := _validation_loss(path)) is not None}
    kept = {*whole[-keep:], *sorted(losses, key=lambda path: (losses[path], path.name))[:best]}
    return [path for path in whole if path not in kept]


def _validation_loss(checkpoint: Path) -> float | None:
    """None where no validation belongs to its step, or it was written before that was recorded."""
    about = checkpoint / _ABOUT
    loss = files.read_object(about).get("validation_loss") if about.is_file() else None
    return loss if isinstance(loss, float) else None


def newest(directory: Path, description: str) -> Path | None:
    """The checkpoint to continue from, whose files are byte by byte those that were written; None for a new run.

    Damaged ones are moved aside with a line that says so. Raises UserError where there are none but damaged ones: a run
    never begins again at step 0 by itself. Collective: one barrier and one all-gather over all ranks per checkpoint
    that is looked into; each rank reads its share of the files once.
    """
    while True:
        name = parallel.on_first_rank(lambda: _newest_whole(directory, description))
        if name is None:
            return None
        checkpoint = directory / name
        if not (different := changed(checkpoint)):
            return checkpoint
        reason = f"{', '.join(different)} is not as it was written"
        parallel.on_first_rank(lambda path=checkpoint, why=reason: _set_aside(path, description, why))  # type: ignore[misc]


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for none."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def whole_checkpoints(directory: Path) -> list[Path]:
    """Those whose files have the sizes they were written with, oldest first."""
    return [path for path in sorted(directory.glob("step-*")) if _has_its_sizes(path)]


def _newest_whole(directory: Path, description: str) -> str | None:
    """The name of the newest one by sizes, after the others were moved aside. On one rank."""
    found = whole_checkpoints(directory)
    for path in sorted(set(directory.glob("step-*")) - set(found)):
        _set_aside(path, description, "its files are not of the sizes they were written with")
    if found:
        return found[-1].name
    if damaged := sorted(path.name for path in directory.glob(_DAMAGED + "*")):
        raise UserError(
            f"{directory}: expected a checkpoint that can be loaded, found only {', '.join(damaged)}. Restore one from "
            "a copy, named step-NNNNNNN, or remove the directory to begin again at step 0."
        )
    return None


def _set_aside(checkpoint: Path, description: str, reason: str) -> None:
    target, number = checkpoint.with_name(_DAMAGED + checkpoint.name), 1
    while target.exists():
        target, number = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}.{number}"), number + 1
    checkpoint.rename(target)
    files.sync_directory(checkpoint.parent)
    console.say(f"{description}  leaves out {checkpoint}: {reason}. It was moved to {target.name}")


# What a checkpoint's files are


def sizes(directory: Path) -> dict[str, int]:
    """{relative path: bytes} of the files in a directory, without the records of them."""
    found = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in _RECORDS)
    return {str(path.relative_to(directory)): path.stat().st_size for path in found}


def _has_its_sizes(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / SIZES).read_text()) == sizes(checkpoint))
    except ValueError:  # no JSON, or no text
        return False
    except OSError as error:
        if of_the_machine(error):
            raise  # which says nothing of the checkpoint
        return False


def changed(checkpoint: Path) -> list[str]:
    """Names of files whose CRC-32 is not the recorded one, the same on every rank. One all-gather.

    Neither Megatron nor torch compares checksums: a flipped bit in a weight would be trained on without a word.
    """
    record = checkpoint / _CHECKSUMS
    try:
        recorded = json.loads(record.read_text())
    except FileNotFoundError:
        return []  # written before checksums were
    except ValueError:
        return [record.name]
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = sorted(recorded)[rank::ranks]
    found = _gathered({name: _crc32(checkpoint / name) for name in own})
    return [name for name in sorted(recorded) if found[name] != recorded[name]]


def _crc32(path: Path) -> int:
    try:
        return files.crc32(path)
    except OSError as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"{path}: expected a file of the checkpoint that can be read, found: {error}. Mend the disk; or rename the "
            "checkpoint to begin with damaged-, and the same command continues from the one before."
        ) from None
