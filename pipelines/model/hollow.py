"""Teacher and student of a distillation at their true size without a byte of weights: what each rank of a layout would
build and read, found in one process, on no GPU.

The process groups are torch's fake ones, whose collectives do nothing, at the whole layout; the models are on the meta
device, which has shapes and dtypes alone. The layers are those in plain torch, which carry Transformer Engine's names.
A program of its own, since its process groups cannot share a process with real ones:

    python -m pipelines.model.hollow < request.json > found.json
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipelines.config import Layout
from pipelines.families import ModelShape
from pipelines.model import build, cpu_runtime
from pipelines.model.pair import DistillationPair, schedule_config
from pipelines.model.safetensors_stream import Tensors, write_hollow
from pipelines.model.signals import FeatureLosses
from pipelines.model.weights import load_hugging_face, named_parameters
from pipelines.signals import FeatureLoss

WHO = ("teacher", "student")


@dataclass(frozen=True)
class Request:
    """directories: of weights whose headers are read; None: an index and headers are generated from the shape.
    precisions: of the two models, "fp32" or "bf16"."""

    shapes: dict[str, ModelShape]
    directories: dict[str, str | None]
    precisions: dict[str, str]
    ranks: Layout
    recompute: bool
    sequence_length: int
    losses: list[FeatureLoss]

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Request":
        return cls(
            {who: ModelShape(**shape) for who, shape in given["shapes"].items()},
            given["directories"],
            given["precisions"],
            Layout(**given["ranks"]),
            given["recompute"],
            given["sequence_length"],
            [FeatureLoss(**loss) for loss in given["losses"]],
        )


class Headers(Tensors):
    """A directory's tensors by their headers: each is on the meta device, and no data is read. read: by name, where it
    was cut: (dim, start, stop), or None for the whole."""

    def __init__(self, directory: str | Path) -> None:
        super().__init__(directory)
        self.read: dict[str, tuple[int, int, int] | None] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read[name] = None
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        self.read[name] = (dim, start, stop)
        size = list(self.shape(name))
        assert 0 <= start <= stop <= size[dim], f"{name}: {start}:{stop} of dim {dim} with {size[dim]} indices"
        size[dim] = stop - start
        return torch.empty(size, dtype=self.dtype(name), device="meta")


def distinct_ranks(ranks: Layout) -> Iterator[int]:
    """Global ranks whose shards differ: one for each place in the tensor- and the pipeline-parallel group, the first of
    its data- and context-parallel ranks. Megatron numbers tensor x context x data x pipeline."""
    for stage in range(ranks.pipeline):
        for place in range(ranks.tensor):
            yield place + ranks.tensor * ranks.context * ranks.data * stage


def lay_out(ranks: Layout, rank: int) -> None:
    """This process as one rank of a world of which the others do not exist."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=ranks.processes, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=ranks.tensor,
        pipeline_model_parallel_size=ranks.pipeline,
        context_parallel_size=ranks.context,
        create_gloo_process_groups=False,
    )


def build_rank(request: Request, rank: int, weights: dict[str, str]) -> dict[str, Any]:
    """{"rank", "tensor", "pipeline", "models": {who: {"parameters": {Megatron name: [numbers, bytes of one]}, "read":
    as Headers.read}}, "trained": {name in the pair: numbers}}; a model that cannot be built or read has "error"
    instead, with the tensor that was being read, and then nothing is "trained"."""
    lay_out(request.ranks, rank)
    found: dict[str, Any] = {
        "rank": rank,
        "tensor": parallel_state.get_tensor_model_parallel_rank(),
        "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        "models": {},
        "trained": {},
    }
    built: dict[str, GPTModel] = {}
    for who in WHO:
        tensors = None
        try:
            model = _build(request, who)
            tensors = Headers(weights[who])
            load_hugging_face(model, tensors, request.shapes[who])
        except Exception as error:
            tensor = next(reversed(tensors.read), None) if tensors is not None else None
            found["models"][who] = {"error": f"{type(error).__name__}: {error}", "tensor": tensor}
            continue
        sizes = {name: [p.numel(), p.element_size()] for name, p in named_parameters(model).items()}
        found["models"][who] = {"parameters": sizes, "read": tensors.read}
        built[who] = model
    if len(built) == len(WHO):
        found["trained"] = _trained(request, built["teacher"], built["student"])
    return found


def _build(request: Request, who: str) -> GPTModel:
    shape = request.shapes[who]
    config = build.transformer_config(
        shape,
        sequence_parallel=request.ranks.sequence_parallel,
        precision=request.precisions[who],
        recompute=request.recompute and who == "student",
        context_parallel_size=1,  # cuts sequences, not weights; attention over parts is Transformer Engine's
    )
    with torch.device("meta"):
        return build.build_model(shape, config=config, sequence_length=request.sequence_length)


def _trained(request: Request, teacher: GPTModel, student: GPTModel) -> dict[str, int]:
    """What of the pair gets gradients."""
    features = FeatureLosses(request.losses, student, teacher) if request.losses else None
    pair = DistillationPair(
        student,
        teacher,
        config=schedule_config(student.config, teacher.config),
        vocab_size=request.shapes["student"].vocab_size,
        kd_weight=1.0,
        features=features,
    )
    return {name: parameter.numel() for name, parameter in pair.named_parameters() if parameter.requires_grad}


def build_all(request: Request, scratch: Path) -> list[dict[str, Any]]:
    """`build_rank` of every distinct rank. scratch: an existing directory for generated headers."""
    cpu_runtime.install()
    weights = {}
    for who in WHO:
        given = request.directories[who]
        if given is None:
            (scratch / who).mkdir()
            dtype = torch.float32 if request.precisions[who] == "fp32" else torch.bfloat16
            write_hollow(scratch / who, {n: (size, dtype) for n, size in request.shapes[who].tensor_shapes().items()})
        weights[who] = given or str(scratch / who)
    return [build_rank(request, rank, weights) for rank in distinct_ranks(request.ranks)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as temporary:
        answer = build_all(Request.of(json.load(sys.stdin)), Path(temporary))
    json.dump(answer, sys.stdout)
