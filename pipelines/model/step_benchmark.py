"""The whole training step, measured: forward of both models, loss, backward, reduction of gradients, optimizer.

A contender is a function of one global batch that makes one step and returns the loss. All are built from the same
weights and settings, on the same layers and the same optimizer of Megatron; what differs is the way from the students'
hidden states to the loss, and what it keeps.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from pipelines.families import ModelShape
from pipelines.model import adam, build, measure
from pipelines.model.measure import Unavailable
from pipelines.model.pair import DistillationPair
from pipelines.model.step import Batch, training_step, wrap
from pipelines.model.weights import load_hugging_face

Step = Callable[[Sequence[Batch]], float]


@dataclass(frozen=True)
class Models:
    """What to build: shapes, where their weights lie (Hugging Face directories), and how."""

    student: ModelShape
    teacher: ModelShape
    student_directory: Path
    teacher_directory: Path
    sequence_length: int
    precision: str
    sequence_parallel: bool
    distributed_optimizer: bool

    def load(self, which: str, **overrides: Any) -> GPTModel:
        """which: "student" or "teacher". overrides: fields of Megatron's TransformerConfig."""
        shape: ModelShape = getattr(self, which)
        config = build.transformer_config(
            shape, sequence_parallel=self.sequence_parallel, precision=self.precision, **overrides
        )
        model = build.build_model(shape, sequence_length=self.sequence_length, config=config)
        load_hugging_face(model, getattr(self, f"{which}_directory"), shape)
        return model


@dataclass(frozen=True)
class StepMeasurement:
    """seconds, fastest_seconds: median and least of a step, on the slowest rank. peak_bytes_beyond_state: the most that
    a step holds at a time beyond weights, gradients and optimizer, on the largest rank. loss: of the second step."""

    seconds: float
    fastest_seconds: float
    peak_bytes_beyond_state: int
    loss: float


def stillhouse(models: Models) -> Step:
    """model/step.py under Megatron's DistributedDataParallel, as the trainer runs it."""
    pair = DistillationPair(models.load("student"), models.load("teacher"), vocab_size=models.student.vocab_size)
    model = wrap(pair, distributed_optimizer=models.distributed_optimizer)
    update = optimizer(model, models)

    def step(batches: Sequence[Batch]) -> float:
        means = training_step(model, batches)
        update()
        return means["loss"]

    return step


def optimizer(model: Any, models: Models) -> Callable[[], None]:
    """Megatron's optimizer over a wrapped model; the function takes one step with what is in main_grad."""
    adam.install()
    bf16 = models.precision == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-5,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=models.distributed_optimizer,
    )
    megatron_optimizer = get_megatron_optimizer(config, [model])

    def update() -> None:
        megatron_optimizer.step()
        # It leaves main_grad as the parameters' grad, to which the next backward pass would add.
        megatron_optimizer.zero_grad()

    return update


def random_batches(
    micro_batch_size: int, micro_batches: int, sequence_length: int, vocabulary: int, seed: int
) -> list[Batch]:
    """This data-parallel rank's micro batches of random tokens, every one of which counts."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(sequence_length).expand(micro_batch_size, sequence_length).contiguous()
    batches = []
    for _ in range(micro_batches):
        ids = torch.randint(0, vocabulary, (micro_batch_size, sequence_length + 1), generator=generator)
        batches.append(
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "position_ids": positions,
                "loss_mask": torch.ones(micro_batch_size, sequence_length),
            }
        )
    return batches


def run(
    steps: Mapping[str, Step], batches: Sequence[Batch], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, StepMeasurement | Unavailable]:
    """Every contender on the same batches, in turns. Collective. Unavailable: it does not fit into the memory."""
    works = {name: partial(step, batches) for name, step in steps.items()}
    # The first step also makes the optimizer's state.
    working = {name: work for name, work in works.items() if measure.fits(work, device)}
    peaks = {name: measure.peak_bytes(work, device) for name, work in working.items()}
    times = measure.seconds_in_turns(working, device, rounds=rounds, warmup=warmup)
    found: dict[str, StepMeasurement | Unavailable] = dict.fromkeys(steps, Unavailable("does not fit into the memory"))
    for name, values in times.items():
        found[name] = StepMeasurement(statistics.median(values), min(values), *peaks[name])
    return found


def largest_micro_batch(step: Step, batches_of: Callable[[int], Sequence[Batch]], device: torch.device) -> int:
    """The greatest number of sequences per micro batch for which a step fits into the GPU's memory; 0 for none.

    Doubles until a step does not fit, then bisects. Collective.
    """
    fits, too_large = 0, 1
    while measure.fits(partial(step, batches_of(too_large)), device):
        fits, too_large = too_large, 2 * too_large
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if measure.fits(partial(step, batches_of(middle)), device):
            fits = middle
        else:
            too_large = middle
    return fits
