"""Hugging Face weights into Megatron shards: of each shard one rank reads its slices and gives its replicas theirs.

Where a tensor goes and how it is cut stands in pipelines/families.py; `shard_view` is the one place that knows how
Megatron packs several tensors into one parameter. Writing back (export.py) reads through the same view.
"""

from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt import GPTModel

from pipelines.families import EMBEDDING, ModelShape, Tensor
from pipelines.model.safetensors_stream import Tensors

_LAYERS = "decoder.layers."
_HEAD = "output_layer.weight"


@torch.no_grad()
def load_hugging_face(model: GPTModel, directory: str | Path | Tensors, shape: ModelShape) -> None:
    """Overwrite the parameters of this rank's shard in place, cast to their dtype; rows of padding become 0.

    model: built from `shape` under the current parallel_state, on any device. A rank holds its shard and the mapped
    slice of one tensor. The first data-parallel (and context-parallel) rank of each shard reads the files, the others
    only their headers: one broadcast per parameter over these replicas, so that a shared disk is read once however many
    there are. Collective over them. Raises UserError where the directory does not hold the tensors of `shape`.
    """
    tensors = directory if isinstance(directory, Tensors) else Tensors(directory)
    tensors.expect_model(shape)
    parameters = named_parameters(model)
    places = [
        (name, tensor, target)
        for name, tensor in shape.tensors().items()
        for target in _targets(name, tensor, shape)
        if target in parameters
    ]
    missing = Counter(target for _, _, target in places)
    assert set(missing) == set(parameters), f"parameters without a tensor: {sorted(set(parameters) - set(missing))}"
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    reads, several = dist.get_rank(replicas) == 0, dist.get_world_size(replicas) > 1
    gathered: dict[str, torch.Tensor] = {}  # parameters in FP8, which are only written whole
    for name, tensor, target in places:
        parameter = parameters[target]
        value = parameter.data
        if is_float8tensor(parameter):
            value = gathered.setdefault(
                target, torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            )
        if reads:
            _read(tensors, name, tensor, value, shape)
        missing[target] -= 1
        if missing[target]:
            continue
        if several:
            dist.broadcast(value, group=replicas, group_src=0)
        if target in gathered:
            parameter.copy_(gathered.pop(target))


def named_parameters(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    """The parameters of this pipeline stage by Megatron name, layers numbered over the whole model from 0."""
    named = {}
    for name, parameter in model.named_parameters():
        if name.startswith(_LAYERS):
            index, rest = name.removeprefix(_LAYERS).split(".", 1)
            name = f"{_LAYERS}{model.decoder.layers[int(index)].layer_number - 1}.{rest}"
        named[name] = parameter
    return named


def shard_view(value: torch.Tensor, tensor: Tensor, shape: ModelShape) -> torch.Tensor:
    """The shard of one Hugging Face tensor as a view into `value`, which is laid out as its Megatron parameter's shard.

    query: (groups / tp, heads per group, head_dim, hidden); key, value: (groups / tp, 1, head_dim, hidden);
    every other: (rows, columns) or (size,). Its elements in order are those of the Hugging Face tensor's shard.
    """
    if tensor.part in ("gate", "up"):
        return value.unflatten(0, (2, -1))[("gate", "up").index(tensor.part)]
    if tensor.part:
        queries = shape.num_attention_heads // shape.num_key_value_heads
        place = {"query": slice(0, queries), "key": slice(queries, queries + 1), "value": slice(queries + 1, None)}
        return value.unflatten(0, (-1, queries + 2, shape.head_dim))[:, place[tensor.part]]
    return value


def shard_length(view: torch.Tensor, tensor: Tensor, shape: ModelShape) -> int:
    """How many indices of the tensor's parallel dim one rank's shard counts, padding included."""
    assert tensor.parallel_dim is not None
    others = [shape.axis_size(axis) for dim, axis in enumerate(tensor.axes) if dim != tensor.parallel_dim]
    return view.numel() // others[0] if others else view.numel()


def _targets(name: str, tensor: Tensor, shape: ModelShape) -> tuple[str, ...]:
    """The Megatron parameters that hold the tensor: a tied embedding is also the head of a last stage of its own."""
    if name == EMBEDDING and shape.tie_word_embeddings:
        return tensor.megatron, _HEAD
    return (tensor.megatron,)


def _read(tensors: Tensors, name: str, tensor: Tensor, value: torch.Tensor, shape: ModelShape) -> None:
    view = shard_view(value, tensor, shape)
    dim = tensor.parallel_dim
    if dim is None:
        view.copy_(tensors[name])
        return
    length, size = shard_length(view, tensor, shape), shape.axis_size(tensor.axes[dim])
    first = parallel_state.get_tensor_model_parallel_rank() * length
    start, stop = min(first, size), min(first + length, size)
    found = tensors.slice(name, dim, start, stop)
    if stop - start == length:
        view.copy_(found.view(view.shape) if view.dim() > found.dim() else found)
        return
    assert tensor.axes[dim] == "vocabulary" and dim == 0, f"{name}: {length} x tp does not cover {size}"
    view[: stop - start].copy_(found)
    view[stop - start :].zero_()
