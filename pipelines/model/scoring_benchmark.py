"""What scoring costs: the same batches scored, and only passed through the model, in turns."""

import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel

from pipelines.model import measure
from pipelines.model.documents import moved
from pipelines.model.forward import Batch, forward_pass, micro_batches_per_pass, without_head
from pipelines.model.scoring import score

SCORING, FORWARD, WITH_HEAD = "scoring", "forward", "forward with head"


@dataclass(frozen=True)
class ScoringMeasurement:
    """seconds, fastest_seconds: median and least over all batches, on the slowest rank. peak_bytes: the most that is
    held at a time beyond the weights, on the largest rank."""

    seconds: float
    fastest_seconds: float
    peak_bytes: int


def run(
    model: GPTModel, batches: Sequence[Batch], device: torch.device, *, rounds: int, warmup: int
) -> dict[str, ScoringMeasurement]:
    """Scoring by activations (`scoring.score`), which leaves the output head out, beside the bare forward passes
    without and with it. batches: of one size, on the CPU, as calibration gives them. Collective."""
    size = len(batches[0]["tokens"])

    def scoring() -> None:
        score(model, batches, micro_batch_size=size)

    def forward(head: bool) -> None:
        per_pass = micro_batches_per_pass()
        with nullcontext() if head else without_head(model):
            for start in range(0, len(batches), per_pass):
                forward_pass(model, [moved(batch, device) for batch in batches[start : start + per_pass]])

    model.eval()
    works = {SCORING: scoring, FORWARD: lambda: forward(False), WITH_HEAD: lambda: forward(True)}
    peaks = {name: measure.peak_bytes(work, device)[0] for name, work in works.items()}
    times = measure.seconds_in_turns(works, device, rounds=rounds, warmup=warmup)
    return {name: ScoringMeasurement(statistics.median(t), min(t), peaks[name]) for name, t in times.items()}
