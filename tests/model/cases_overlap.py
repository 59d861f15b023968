"""What runs in the ranks of test_overlap.py."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from pipelines.model import adam, parallel
from pipelines.model.step import Batch, evaluation_step, training_step, wrap
from tests.model.cases_signals import DEEP, build, losses_of
from tests.model.cases_step import STUDENT, TEACHER, build_pair, random_batches, write_models

STEPS = 3


def steps(directory: Path, distributed: bool, tied: bool = False, hidden: bool = False) -> dict[str, Any]:
    """Means and weights of three steps and an evaluation on DP ranks, with communication overlapped and without.

    Every parameter has a bucket of its own, so that each is waited for by itself or not at all.
    """
    parallel.initialize(1)
    student = STUDENT.replace(tie_word_embeddings=tied)
    write_models(directory, student, DEEP if hidden else TEACHER)
    found: dict[str, Any] = {}
    for name, overlap in (("plain", False), ("overlapped", True)):
        if hidden:
            pair = build(directory, student, losses_of(student, True, False, False), {})
        else:
            pair = build_pair(directory, student, TEACHER, {}, kd_weight=0.7, ce_weight=0.3, temperature=2.0)
        settings: dict[str, Any] = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap and distributed}
        model = wrap(pair, distributed_optimizer=distributed, bucket_size=1, **settings)
        adam.install()
        config = OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.0, use_distributed_optimizer=distributed)
        optimizer = get_megatron_optimizer(config, [model])
        means, left = [], 0
        for batches in own_batches():
            means.append(training_step(model, batches))
            left += outstanding(model)
            optimizer.step()
            optimizer.zero_grad()
        means.append(evaluation_step(model, own_batches()[0]))
        left += outstanding(model)
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        found[name] = {"means": means, "weights": weights, "outstanding": left, "buckets": len(model.bucket_groups)}
    plain, overlapped = found["plain"], found["overlapped"]
    return {
        "means": plain["means"] == overlapped["means"],
        "weights": all(torch.equal(w, overlapped["weights"][n]) for n, w in plain["weights"].items()),
        "learned": plain["means"][-1]["loss"] != plain["means"][0]["loss"],
        "outstanding": overlapped["outstanding"],
        "buckets": overlapped["buckets"] - len(overlapped["weights"]),
    }


def own_batches() -> list[list[Batch]]:
    """Of each step, this rank's micro batches."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [random_batches(2, ranks, STUDENT.vocab_size, seed=seed)[rank] for seed in range(STEPS)]


def outstanding(model: DistributedDataParallel) -> int:
    """Collectives that were started and that nobody has waited for."""
    groups = model.bucket_groups
    return sum(group.grad_reduce_handle is not None or group.param_gather_handle is not None for group in groups)
