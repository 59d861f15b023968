"""Megatron shards back into a Hugging Face directory: one tensor at a time to global rank 0, and from there to disk."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from pipelines.config import UserError
from pipelines.families import ModelShape, Tensor
from pipelines.model import parallel
from pipelines.model.hub_files import write_hub_files
from pipelines.model.safetensors_stream import Writer
from pipelines.model.weights import named_parameters, shard_length, shard_view

_BLOCK_BYTES = 64 * 2**20  # of a tensor on its way from all ranks to the first


def _itself(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter


def save_hugging_face(
    model: GPTModel,
    directory: str | Path,
    shape: ModelShape,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    origin: str | Path | None = None,
    max_shard_bytes: float = 5e9,
    parameter: Callable[[torch.nn.Parameter], torch.Tensor] = _itself,
) -> None:
    """Write safetensors, config.json, generation_config.json and the tokenizer's files; `directory` appears whole.

    model: a bare GPTModel. dtype: of the files; None: the parameters'. tokenizer: a directory to copy the tokenizer's
    files from. origin: the model that this one was trained from, as `write_hub_files` takes it. parameter: what to
    write for a parameter, such as its fp32 master copy; in the parameter's layout.
    Collective over all ranks: the gathers of `gather_hugging_face` and one barrier over the world, after which every
    rank may read the directory. Every rank raises rank 0's UserError when it cannot write.
    """
    dtype = dtype or parameter(next(model.parameters())).dtype
    saving = _Saving(Path(directory))
    if dist.get_rank() == 0:
        saving.attempt(lambda: saving.begin(shape, dtype, tokenizer, origin, max_shard_bytes))
    # After a failure the gathers go on: the other ranks wait in them and have yet to learn of it.
    for name, tensor in gather_hugging_face(model, shape, parameter, dtype):
        if tensor is not None:
            saving.attempt(partial(saving.write, name, tensor))
        del tensor  # before the next one is gathered
    parallel.on_first_rank(saving.finish)


class _Saving:
    """Rank 0's part: steps that do nothing more after the first failure, which also removes what was built."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.failure: str | None = None
        self.writer: Writer | None = None

    def attempt(self, step: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            step()
        except (UserError, OSError) as error:
            written = (
                f"{self.directory}: expected to write a model there, found: {error}. Check the disk and its rights."
            )
            self.failure = str(error) if isinstance(error, UserError) else written
            if self.writer is not None:
                self.writer.abandon()

    def begin(
        self,
        shape: ModelShape,
        dtype: torch.dtype,
        tokenizer: str | Path | None,
        origin: str | Path | None,
        max_shard_bytes: float,
    ) -> None:
        announced = {name: (size, dtype) for name, size in shape.tensor_shapes().items()}
        self.writer = Writer(self.directory, announced, max_shard_bytes)
        write_hub_files(self.writer.partial, shape, dtype, tokenizer, origin)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        assert self.writer is not None
        self.writer.write(name, tensor)

    def finish(self) -> None:
        self.attempt(self._close)
        if self.failure is not None:
            raise UserError(self.failure)

    def _close(self) -> None:
        assert self.writer is not None
        self.writer.close()


def gather_hugging_face(
    model: GPTModel,
    shape: ModelShape,
    value: Callable[[torch.nn.Parameter], torch.Tensor] = _itself,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(Hugging Face name, tensor) in the order of `shape.tensors()`: a fresh, unpadded tensor on rank 0, else None.

    value: what to gather for a parameter, of its shape (such as lambda p: p.main_grad); dtype: None keeps its own.
    Collective: every rank iterates to the end. Per tensor, one gather per 64 MiB over the tensor-parallel group of
    its pipeline stage, and one send from the stage's first rank to rank 0; once, an all-gather of names over the
    pipeline group. Data- and context-parallel replicas take no part. Of a tied embedding the first stage's is taken.
    """
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        yield from ((name, None) for name in shape.tensors())
        return
    parameters = named_parameters(model)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first_of_stage = parallel_state.get_tensor_model_parallel_rank() == 0
    group = parallel_state.get_pipeline_model_parallel_group()
    owners = _owners({name: dtype or value(parameter).dtype for name, parameter in parameters.items()}, group)
    device = next(model.parameters()).device
    for name, tensor in shape.tensors().items():
        owner, tensor_dtype = owners[tensor.megatron]
        whole: torch.Tensor | None = None
        if stage == owner:
            whole = _gather(value(parameters[tensor.megatron]).detach(), tensor, shape, tensor_dtype)
        if owner != 0 and first_of_stage and stage in (0, owner):
            if whole is not None:
                dist.send(whole, group=group, group_dst=0)
            else:
                whole = torch.empty(shape.tensor_shapes()[name], dtype=tensor_dtype, device=device)
                dist.recv(whole, group=group, group_src=owner)
        yield name, whole if dist.get_rank() == 0 else None


def _owners(held: dict[str, torch.dtype], group: dist.ProcessGroup) -> dict[str, tuple[int, torch.dtype]]:
    """{Megatron name: (first pipeline stage that holds it, dtype there)}."""
    stages: list[dict[str, torch.dtype]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(stages, held, group=group)
    owners: dict[str, tuple[int, torch.dtype]] = {}
    for stage, names in enumerate(stages):
        for name, dtype in names.items():
            owners.setdefault(name, (stage, dtype))
    return owners


def _gather(value: torch.Tensor, tensor: Tensor, shape: ModelShape, dtype: torch.dtype) -> torch.Tensor | None:
    """The whole tensor on the first rank of the tensor-parallel group, None on the others."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    view, dim = shard_view(value, tensor, shape), tensor.parallel_dim
    if dim is None:
        return view.to(dtype, copy=True) if rank == 0 else None
    whole, targets = None, []
    if rank == 0:
        sizes = [shape.axis_size(axis) for axis in tensor.axes]
        sizes[dim] = shard_length(view, tensor, shape) * ranks
        whole = view.new_empty(sizes, dtype=dtype)
        targets = [part.view(view.shape) for part in whole.chunk(ranks, dim)]
    # By blocks, so that the first rank holds one whole tensor and not a second one made of its shards.
    rows = max(1, _BLOCK_BYTES // (view[0].numel() * dtype.itemsize * ranks))
    for start in range(0, view.shape[0], rows):
        block = view[start : start + rows].to(dtype).contiguous()
        blocks = [torch.empty_like(block) for _ in targets]
        dist.gather(block, blocks or None, group=group, group_dst=0)
        for target, received in zip(targets, blocks, strict=True):
            target[start : start + rows] = received
        del block, blocks
    return None if whole is None else whole.narrow(dim, 0, shape.axis_size(tensor.axes[dim]))
