"""Seconds and memory of cutting a student out of a checkpoint of a recipe's size, without any download.

    python launchers/slicing_benchmark.py --directory SCRATCH [OVERRIDES ...]

Writes a teacher of zeros in bf16 of the composed configuration's shape (experiment=llama31_8b_to_4b_width where no
override is given) to <directory>/teacher, cuts its student out as stage=prune does, by random scores, and removes both.
The 8B teacher takes 16 GB there and its student 9. Prints the seconds, the student's bytes per second, and the greatest
memory of the process that no file backs (RssAnon of Linux), beside the largest tensor.
"""

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from pipelines import planning  # noqa: E402
from pipelines.compose import compose  # noqa: E402
from pipelines.families import ModelShape  # noqa: E402
from pipelines.model.hub_files import write_hub_files  # noqa: E402
from pipelines.model.safetensors_stream import Writer  # noqa: E402
from pipelines.model.slicing import slice_checkpoint, sliced_shape  # noqa: E402
from pipelines.pruning.choice import checked_target, choose  # noqa: E402
from pipelines.pruning.scores import random_scores  # noqa: E402

BYTES = 2  # per weight in bf16


class PrivateMemory:
    """The greatest RssAnon of this process between `with` and its end, beyond what it was before, in bytes."""

    def __enter__(self) -> "PrivateMemory":
        self.peak, self._before, self._over = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self._now() - self._before)

    @staticmethod
    def _now() -> int:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def write_zeros(directory: Path, shape: ModelShape) -> None:
    announced = {name: (size, torch.bfloat16) for name, size in shape.tensor_shapes().items()}
    with Writer(directory, announced) as writer:
        write_hub_files(writer.partial, shape, torch.bfloat16)
        for name, (size, dtype) in announced.items():
            writer.write(name, torch.zeros(size, dtype=dtype))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    config = compose(given.overrides or ["experiment=llama31_8b_to_4b_width"])
    teacher = planning.teacher_shape(config)
    drops = config.student.drop_layers
    kept = choose(random_scores(teacher, seed=1), teacher, checked_target(config, teacher), drop_layers=drops)
    student = sliced_shape(teacher, kept)
    source, target = given.directory / "teacher", given.directory / "student"
    try:
        write_zeros(source, teacher)
        with PrivateMemory() as memory:
            start = time.perf_counter()
            slice_checkpoint(source, target, teacher, kept)
            seconds = time.perf_counter() - start
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
    written = BYTES * student.parameters()
    largest = BYTES * max(torch.Size(size).numel() for size in teacher.tensor_shapes().values())
    print(
        f"{teacher.parameters():,} -> {student.parameters():,} parameters in {seconds:.1f} s, "
        f"{written / seconds / 1e9:.3f} GB/s of the student; private memory up to {memory.peak / 2**30:.2f} GiB, "
        f"largest tensor {largest / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
