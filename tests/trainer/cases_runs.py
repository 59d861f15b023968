"""Run in ranks: short distillations through NeMo's trainer, at any layout, some of which go wrong on purpose."""

import errno
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.trainer.cases_training import SEQUENCE, SHAPE, fit_shortly, nemo_on_cpu

STUDENT = {"hidden_size": 32, "intermediate_size": 48}
_forks: list[None] = []


def trained(
    directory: str,
    corpus: str,
    name: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    precision: str = "fp32",
    fault: str = "",
    at: int = 0,
    faults: Sequence[tuple[str, int]] = (),
    late: bool = False,
    stuck: int = 0,
    full: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """A run in directory/name, continued where it has a checkpoint. fault: a function below, at a step; faults: more.
    late, stuck, full: see `_writes`.

    What it left: message (of a UserError or a stop, else empty), figures, costs, finite (the weights), states ({step: a
    hash of this rank's weights and of what its optimizer keeps, after it}), writing (the steps at whose end this rank
    wrote a checkpoint's files), gathered (bytes that Megatron's distributed optimizer gave this rank at a save), rows,
    checkpoints (names); forks: how often this rank was forked.
    """
    from pipelines.model import parallel

    nemo_on_cpu()
    parallel.initialize(tensor, pipeline)
    import torch

    from pipelines import launch, stopping
    from pipelines.config import UserError
    from pipelines.families import ModelShape
    from pipelines.model import build
    from pipelines.model.export import save_hugging_face
    from pipelines.model.pair import DistillationPair, schedule_config
    from pipelines.model.weights import load_hugging_face

    root, teacher_shape = Path(directory), ModelShape(**SHAPE)
    shape = teacher_shape.replace(**STUDENT)
    parallel.on_first_rank(lambda: _write_models(root, teacher_shape, shape))
    options = {"sequence_parallel": sequence_parallel, "precision": precision}
    teacher_config, student_config = (build.transformer_config(s, **options) for s in (teacher_shape, shape))
    config = schedule_config(student_config, teacher_config)
    pairs, states = [], _states()

    def built() -> DistillationPair:
        teacher = build.build_model(teacher_shape, config=teacher_config, sequence_length=SEQUENCE)
        load_hugging_face(teacher, root / "teacher", teacher_shape)
        student = build.build_model(shape, config=student_config, sequence_length=SEQUENCE)
        load_hugging_face(student, root / "student", shape)
        pairs.append(DistillationPair(student, teacher, config=config, vocab_size=shape.vocab_size, kd_weight=1.0))
        return pairs[0]

    message, figures, costs = "", {}, {}
    if not _forks:  # a hook cannot be taken back
        _forks.append(None)
        os.register_at_fork(before=lambda: _forks.append(None))
    forks = len(_forks)
    try:
        callbacks = [states, *(_fault(*one) for one in [*faults, *([(fault, at)] if fault else [])])]
        with _writes(states, late, stuck, full):
            _, figures, costs = fit_shortly(
                root / name, corpus, config, built, callbacks, precision=precision, **settings
            )
    except (UserError, Stopped, stopping.Stopped) as error:
        message = str(error)
    except SystemExit as error:
        assert launch.ended_from_outside(error)
        message = launch.describe_failure(error)["message"]
    stopping._received = False
    if not message:
        save_hugging_face(pairs[0].student, root / name / "last", shape, tokenizer=Path(corpus) / "tokenizer")
    torch.distributed.barrier()
    finite = all(bool(torch.isfinite(p).all()) for p in pairs[0].student.parameters()) if pairs else None
    parallel_state_gone()
    metrics, checkpoints = root / name / "metrics.jsonl", root / name / "checkpoints"
    return {
        "message": message,
        "figures": figures,
        "costs": costs,
        "finite": finite,
        "states": states.found,
        "writing": states.writing,
        "gathered": states.gathered,
        "forks": len(_forks) - forks,
        "rows": metrics.read_text().splitlines() if metrics.exists() else [],
        "checkpoints": sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else [],
    }


def parallel_state_gone() -> None:
    from pipelines.model import parallel

    parallel._destroy()


def _write_models(root: Path, teacher: Any, student: Any) -> None:
    from pipelines.model.random_model import write_random_model

    if not (root / "teacher").exists():
        write_random_model(root / "teacher", teacher, seed=1, std=0.2)
        write_random_model(root / "student", student, seed=2, std=0.2)


class Stopped(Exception):
    """A run that ends here without a word of its own."""


def _states() -> Any:
    """A callback: see `trained`."""
    from lightning.pytorch.callbacks import Callback

    class States(Callback):
        found: dict[int, int] = {}
        writing: list[int] = []
        gathered = 0
        step = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if any(thread.name == "checkpoint" for thread in threading.enumerate()):
                self.writing.append(trainer.global_step)
            self.step = trainer.global_step
            held = [p for p in pl_module.parameters() if p.requires_grad]
            whole = trainer.optimizers[0].mcore_optimizer
            for part in getattr(whole, "chained_optimizers", [whole]):
                held += [value for kept in part.optimizer.state.values() for value in kept.values()]
            hashed = 0
            for value in held:
                hashed = zlib.crc32(value.detach().float().contiguous().numpy().tobytes(), hashed)
            self.found[trainer.global_step] = hashed

    return States()


@contextmanager
def _writes(states: Any, late: bool, stuck: int, full: int) -> Iterator[None]:
    """Where `late`, a checkpoint's files are begun after one more step, or some seconds where there is none; those of
    step `stuck` never. Those of step `full` fail on the second rank, as on a full disk."""
    from unittest import mock

    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from pipelines.trainer import background_write, checkpoints

    ours, gathers = background_write.files.sync_files, DistributedOptimizer.get_parameter_state_dp_zero

    def gather(self: Any, *arguments: Any, **options: Any) -> Any:
        found = gathers(self, *arguments, **options)
        kept = [part for number, parts in found.items() if isinstance(number, int) for part in parts.values()]
        tensors = [value for part in kept for value in part.values() if isinstance(value, torch.Tensor)]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        states.gathered = sum(tensor.nbytes for tensor in tensors)
        return found

    def sync_files(paths: Any) -> None:
        if full and checkpoints.CHECKPOINT.format(full) in str(paths) and torch.distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ours(paths)

    def run(write: Any) -> None:
        step, began = checkpoints.step_of(write.directory), time.monotonic()
        while step == stuck or (late and states.step <= step and time.monotonic() < began + 3):
            time.sleep(0.01)
        written(write)

    written = background_write.Write._run
    with (
        mock.patch.object(background_write.Write, "_run", run),
        mock.patch.object(background_write.files, "sync_files", sync_files),
        mock.patch.object(DistributedOptimizer, "get_parameter_state_dp_zero", gather),
    ):
        yield


def _fault(name: str, at: int) -> Any:
    """A callback that does something once, in step `at` (counted from 1), in the second rank or in both."""
    import torch
    from lightning.pytorch.callbacks import Callback

    from pipelines import stopping

    second = torch.distributed.get_rank() == 1

    class Fault(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.trainer, self.weights = trainer, [p for p in pl_module.parameters() if p.requires_grad]

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step + 1 != at:
                return
            if name == "stop":
                raise Stopped
            if name == "asked" and second:
                stopping._received = True
            if name == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            if name == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "weight before the step" and second:
                self.weights[0].data.fill_(float("nan"))

        def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any = None) -> None:
            training = not step.forward_only and self.trainer.global_step + 1 == at
            for weight in self.weights if name == "gradient" and training and second else []:
                weight.main_grad.view(-1)[0] = float("nan")  # of each: a distributed optimizer's rank looks at its own
            if name == "spike" and training:
                self.weights[-1].main_grad.mul_(1e4)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if name == "weight after the step" and trainer.global_step == at and second:
                self.weights[0].data.view(-1)[0] = float("inf")

    return Fault()


def exported(directory: str, corpus: str, name: str, step: int, tensor: int) -> dict[str, bool]:
    """That checkpoint of a run as a Hugging Face directory; {name: whether the run ended with the same tensor}."""
    from safetensors.torch import load_file

    from pipelines.families import ModelShape
    from pipelines.model import parallel
    from pipelines.trainer.kept_checkpoint import convert_to_hugging_face

    nemo_on_cpu()
    parallel.initialize(tensor)
    root, shape = Path(directory), ModelShape(**SHAPE).replace(**STUDENT)
    checkpoint = root / name / "checkpoints" / f"step-{step:07d}"
    convert_to_hugging_face(checkpoint, root / f"out-{step}-{tensor}", shape, Path(corpus) / "tokenizer")
    parallel_state_gone()
    mine, last = (
        load_file(place / "model.safetensors") for place in (root / f"out-{step}-{tensor}", root / name / "last")
    )
    return {key: bool((mine[key] == last[key]).all()) for key in mine.keys() | last.keys()}


def newest_checkpoint(directory: str) -> str:
    """What a run in this directory would continue from: a name, nothing, or the message that refuses."""
    from pipelines.config import UserError
    from pipelines.trainer import checkpoints

    try:
        return str(getattr(checkpoints.newest(Path(directory), "test"), "name", ""))
    except UserError as error:
        return str(error)
