"""What runs in the ranks of test_benchmark.py."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipelines import artifacts
from pipelines.config import BenchmarkConfig, Config, Contender, ParallelConfig, StudentConfig
from pipelines.core import linear_divergence
from pipelines.model import cpu_runtime, head_benchmark, measure, parallel
from pipelines.stages import benchmark

CPU = torch.device("cpu")


def run(directory: str, contenders: list[str], tensor: int, **settings: Any) -> None:
    """The stage, with the quickstart's teacher of fewer layers for whole steps."""
    asked = [Contender(name) for name in contenders]
    config = Config(
        stage="benchmark",
        parallel=ParallelConfig(tensor=tensor),
        student=StudentConfig(hidden_size=64, intermediate_size=128),
        benchmark=BenchmarkConfig(contenders=asked, rounds=1, **settings),
    )
    shape = config.model.shape
    shape.vocab_size, shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = 512, 96, 256, 2
    shape.head_dim = 24
    # The usual buffer is as large as all the logits of a case this small.
    with mock.patch.dict(linear_divergence.CHUNK_BYTES, cpu=4 << 20):
        benchmark.run(artifacts.StageContext(config, "benchmark", Path(directory)))


def measured() -> dict[str, Any]:
    """Contenders that are as they should be, twice too large, and wasteful, by name: what is found of them."""
    parallel.initialize(torch.distributed.get_world_size())
    case = head_benchmark.Case(64, 96, 16, 24, torch.float32)
    heads, reference = head_benchmark.make(case, CPU, seed=1)

    def wasteful(heads: head_benchmark.Heads) -> torch.Tensor:
        waste = torch.empty(10_000_000, dtype=torch.uint8)
        return head_benchmark.plain_torch(heads) + waste.numel() * 0.0

    def sparing(heads: head_benchmark.Heads) -> torch.Tensor:
        raise torch.OutOfMemoryError

    contenders = {
        "torch": head_benchmark.plain_torch,
        "twice": lambda heads: 2 * head_benchmark.plain_torch(heads),
        "wasteful": wasteful,
        "too_large": sparing,
    }
    return head_benchmark.run(contenders, heads, reference, rounds=2, warmup=0)


def peaks() -> list[int]:
    """Of a tensor of 1,000 bytes; of two, one after the other; of two at a time; of freeing one from before."""
    parallel.initialize(torch.distributed.get_world_size())

    def make() -> torch.Tensor:
        return torch.empty(1000, dtype=torch.uint8)

    def in_turn() -> None:
        first = make()
        del first
        make()

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return make(), make()

    before = [make()]
    return [measure.peak_bytes(work, CPU)[0] for work in (make, in_turn, both, before.pop)]


def suspended() -> tuple[bool, bool, bool]:
    """What torch says of a GPU inside `suspended` and after it, and whether "cuda" means the CPU again after it."""
    cpu_runtime.install()
    with cpu_runtime.suspended():
        inside = torch.cuda.is_initialized()
    return inside, torch.cuda.is_initialized(), torch.zeros(1, device="cuda").device.type == "cpu"
