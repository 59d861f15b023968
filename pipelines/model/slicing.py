"""The student's safetensors, cut tensor by tensor out of the teacher's along the axes in pipelines/families.py."""

from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.core.selection import Kept
from pipelines.families import ModelShape, Tensor, read_shape
from pipelines.model.hub_files import write_hub_files
from pipelines.model.safetensors_stream import Tensors, Writer
from pipelines.text.tokenizer_files import has_tokenizer

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sliced_shape(teacher: ModelShape, kept: Kept) -> ModelShape:
    """The student's shape. head_dim and vocabulary are the teacher's."""
    first = kept.layers[0]
    return teacher.replace(
        hidden_size=len(kept.hidden),
        intermediate_size=len(kept.ffn[first]),
        num_attention_heads=len(kept.heads[first]),
        num_key_value_heads=len(kept.groups[first]),
        num_hidden_layers=len(kept.layers),
    )


def slice_checkpoint(
    source: str | Path,
    destination: str | Path,
    teacher: ModelShape,
    kept: Kept,
    *,
    max_shard_bytes: float = 5e9,
    advance: Callable[[int], None] | None = None,
) -> ModelShape:
    """Write the student's Hugging Face directory, whole or not at all, and return its shape. For one process.

    Each tensor keeps its dtype; at most one teacher's tensor and its cut are held. The tokenizer's files are copied.
    Every written header is read again and compared with the written config.json. advance: called with the parameters
    written since the last call. Raises UserError where the teacher's tensors are not those of its shape, or the disk
    is full.
    """
    source, student = Path(source), sliced_shape(teacher, kept)
    tensors = Tensors(source)
    tensors.expect_model(teacher)
    origins = _origins(teacher, student, kept)
    announced = {name: (size, tensors.dtype(origins[name][0])) for name, size in student.tensor_shapes().items()}
    with Writer(destination, announced, max_shard_bytes) as writer:
        dtype = next(iter(announced.values()))[1]
        write_hub_files(writer.partial, student, dtype, source if has_tokenizer(source) else None)
        for name, tensor in student.tensors().items():
            origin, number = origins[name]
            cut = slice_tensor(tensors[origin], tensor, teacher, kept, number)
            writer.write(name, cut)
            tensors.unmap()
            if advance:
                advance(cut.numel())
        written = read_shape(writer.partial)
        assert written == student, f"config.json: expected {student}, found {written}"
        Tensors(writer.partial).expect(written.tensor_shapes())
    return student


def slice_tensor(value: torch.Tensor, tensor: Tensor, teacher: ModelShape, kept: Kept, number: int) -> torch.Tensor:
    """What stays of one teacher's tensor, its indices in the teacher's order.

    value: one size per axis of `tensor`. number: the teacher's layer, from 1; of tensors outside the layers, any.
    """
    for dim, axis in enumerate(tensor.axes):
        indices = _indices(axis, teacher, kept, number)
        if indices is not None and len(indices) != value.shape[dim]:
            bits = value.view(_BITS[value.dtype.itemsize])  # index_select takes twice as long in bf16
            value = bits.index_select(dim, torch.tensor(indices)).view(value.dtype)
    return value


def _indices(axis: str, teacher: ModelShape, kept: Kept, number: int) -> list[int] | None:
    """The kept indices of an axis; None where it is never cut."""
    if axis == "hidden":
        return kept.hidden
    if axis == "ffn":
        return kept.ffn[number]
    if axis in ("query", "key_value"):
        units = kept.heads[number] if axis == "query" else kept.groups[number]
        return [unit * teacher.head_dim + channel for unit in units for channel in range(teacher.head_dim)]
    assert axis == "vocabulary", axis
    return None


def _origins(teacher: ModelShape, student: ModelShape, kept: Kept) -> dict[str, tuple[str, int]]:
    """{student's tensor: (teacher's tensor, teacher's layer from 1)}: kept layers are numbered anew, in their order."""
    table = [tensor for tensor in teacher.family.tensors if tensor.name in teacher.tensors() or tensor.per_layer]
    origins: dict[str, tuple[str, int]] = {}
    for tensor in table:
        if not tensor.per_layer:
            origins[tensor.name] = (tensor.name, kept.layers[0])
            continue
        for index, number in enumerate(kept.layers):
            origins[tensor.name.format(layer=index)] = (tensor.name.format(layer=number - 1), number)
    assert origins.keys() == student.tensors().keys()
    return origins
