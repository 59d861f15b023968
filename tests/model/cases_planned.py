"""What runs in the ranks of test_planned.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.families import ModelShape
from pipelines.model import adam, measure, parallel
from pipelines.model.build import build_model
from pipelines.model.pair import DistillationPair
from pipelines.model.random_model import write_random_model
from pipelines.model.step import Batch, training_step, wrap
from pipelines.model.weights import load_hugging_face

TEACHER = ModelShape(1024, 192, 512, 4, 6, 2, 32)
STUDENT = TEACHER.replace(hidden_size=128, intermediate_size=384)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 256, 4, 2


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that each kind of collective was given, on this rank."""

    KINDS = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 0, "send": 0}
    # of which argument: what is reduced, gathered into, scattered from, sent

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name in self.KINDS:
            given = args[1] if name == "_reduce_scatter_base_" else args[0]
            tensors = given if isinstance(given, list | tuple) else [given]
            self.found[name] = self.found.get(name, 0) + sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(MICRO_BATCHES):
        ids = torch.randint(0, STUDENT.vocab_size, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        found.append(
            {
                "tokens": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "position_ids": torch.arange(SEQUENCE).expand(MICRO_BATCH, SEQUENCE).contiguous(),
                "loss_mask": torch.ones(MICRO_BATCH, SEQUENCE),
            }
        )
    return found


def pair_of(directory: Path, options: dict[str, Any], recompute: bool) -> DistillationPair:
    if dist.get_rank() == 0:
        for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
            write_random_model(directory / name, shape, seed=1)
    dist.barrier()
    models = []
    for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
        own = options | {"recompute": recompute and name == "student"}
        models.append(build_model(shape, sequence_length=SEQUENCE, **own))
        load_hugging_face(models[-1], directory / name, shape)
    return DistillationPair(*models, vocab_size=STUDENT.vocab_size)


def step(
    directory: Path, tensor: int = 1, pipeline: int = 1, sequence_parallel: bool = False, recompute: bool = False
) -> dict[str, Any]:
    """Bytes of a distillation on this rank, by torch's record of every allocation: what stays, and the most that a step
    of training and of the optimizer holds beside it; and what the collectives of the second step were given."""
    parallel.initialize(tensor, pipeline)
    device = torch.device("cpu")
    pair = pair_of(directory, {"sequence_parallel": sequence_parallel}, recompute)
    model = wrap(pair)
    optimizer = adam.Adam([p for p in pair.parameters() if p.requires_grad])
    given = batches()

    def whole_step() -> None:
        training_step(model, given)
        for parameter in pair.parameters():
            if parameter.requires_grad:
                parameter.grad = parameter.main_grad
        optimizer.step()

    whole_step()  # makes the optimizer's state and Megatron's buffers
    assert pair.teacher is not None
    weights = [*pair.teacher.parameters(), *(p for p in pair.student.parameters())]
    gradients = [buffer.grad_data for buffer in model.buffers]
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    stays = sum(tensor.nbytes for tensor in (*weights, *gradients, *states))
    counted = Collectives()
    with counted:
        training_step(model, given)
    peak, _ = measure.peak_bytes(whole_step, device)
    return {"stays": stays, "peak": peak, "collectives": counted.found}
