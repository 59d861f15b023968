"""Runs on the pool of ranks: weights in, logits, weights out, and what a rank holds meanwhile, at a given layout."""

import errno
import os
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.config import UserError
from pipelines.families import ModelShape, read_shape
from pipelines.model import export, parallel
from pipelines.model.build import build_model
from pipelines.model.safetensors_stream import Tensors
from pipelines.model.weights import load_hugging_face, named_parameters


def round_trip(source: str, output: str, layout: dict[str, Any], ids: Any, dtype: str) -> Any:
    """Load, write to `output` in `dtype`, and return the logits (batch, sequence, vocabulary) of the last stage."""
    model, shape = _loaded(source, **layout)
    export.save_hugging_face(model, output, shape, dtype=getattr(torch, dtype), max_shard_bytes=200_000)
    return _logits(model, shape, torch.tensor(ids))


def round_trip_in_bf16(source: str, output: str, layout: dict[str, Any]) -> None:
    model, shape = _loaded(source, precision="bf16", **layout)
    export.save_hugging_face(model, output, shape)


def gathered(source: str, layout: dict[str, Any]) -> dict[str, Any] | None:
    """Three times each parameter, on the rank that has them."""
    model, shape = _loaded(source, **layout)
    found = {name: t for name, t in export.gather_hugging_face(model, shape, lambda p: p * 3) if t is not None}
    return {name: tensor.detach().numpy() for name, tensor in found.items()} or None


def bytes_held(source: str, output: str, layout: dict[str, Any]) -> dict[str, int]:
    """Bytes of this rank's shard (without padding), of what it read, and its peaks while loading and saving."""
    reading = _Reading()
    parallel.initialize(layout["tensor"], layout["pipeline"])
    shape = read_shape(source)
    model = build_model(shape)
    weights = list(model.parameters())
    readers = {name: reading.of(getattr(Tensors, name)) for name in ("slice", "__getitem__")}
    with mock.patch.multiple(Tensors, **readers), _Allocating(weights, beside_files=True) as loading:
        load_hugging_face(model, source, shape)
    with mock.patch.object(export, "_BLOCK_BYTES", 4096), _Allocating(weights) as saving:
        export.save_hugging_face(model, output, shape)
    return {
        "shard": sum(p.nbytes for p in model.parameters()),
        "read": reading.total,
        "mapped at once": reading.peak,
        "allocated while loading": loading.peak,
        "allocated while saving": saving.peak,
    }


def read_by_replicas(source: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this rank read, where it stands, and its parameters as bytes; NaN where none were put."""
    reading = _Reading()
    readers = {name: reading.of(getattr(Tensors, name)) for name in ("slice", "__getitem__")}
    with mock.patch.multiple(Tensors, **readers):
        model, _ = _loaded(source, **layout)
    parameters = {name: parameter.detach().numpy().tobytes() for name, parameter in named_parameters(model).items()}
    place = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    return {"read": reading.total, "shard": sum(map(len, parameters.values())), "place": place, "weights": parameters}


def build_error(source: str, layout: dict[str, Any]) -> str:
    return _error(lambda: _loaded(source, **layout))


def load_error(source: str, shape: ModelShape, layout: dict[str, Any]) -> str:
    parallel.initialize(layout["tensor"], layout["pipeline"])
    model = build_model(shape)
    return _error(lambda: load_hugging_face(model, source, shape))


def full_disk(source: str, output: str, layout: dict[str, Any], when: str) -> str:
    """What every rank raises when rank 0's disk is full: before anything is written, or while one of its files is."""
    model, shape = _loaded(source, **layout)
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full = {
        "before": mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)),
        "configuration": mock.patch.object(Path, "write_text", side_effect=no_space),
        "weights": mock.patch("os.pwrite", side_effect=no_space),
    }
    with full[when]:
        return _error(lambda: export.save_hugging_face(model, output, shape))


def _loaded(
    source: str, tensor: int, pipeline: int, sequence_parallel: bool = False, precision: str = "fp32"
) -> tuple[GPTModel, ModelShape]:
    parallel.initialize(tensor, pipeline)
    shape = read_shape(source)
    model = build_model(shape, sequence_parallel=sequence_parallel, precision=precision).eval()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    load_hugging_face(model, source, shape)
    _assert_padding_is_zero(model, shape)
    return model, shape


def _assert_padding_is_zero(model: GPTModel, shape: ModelShape) -> None:
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in named_parameters(model).items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = range(rank * parameter.shape[0], (rank + 1) * parameter.shape[0])
            padding = [index for index, row in enumerate(rows) if row >= shape.vocab_size]
            assert (parameter[padding] == 0).all(), name


@torch.no_grad()
def _logits(model: GPTModel, shape: ModelShape, ids: torch.Tensor) -> Any:
    """Forward through the pipeline's stages by hand; None on other stages than the last."""
    batch, sequence = ids.shape
    positions = torch.arange(sequence).expand(batch, -1)
    group = parallel_state.get_pipeline_model_parallel_group()
    stage, stages = dist.get_rank(group), dist.get_world_size(group)
    if stage > 0:
        shares = parallel_state.get_tensor_model_parallel_world_size() if model.config.sequence_parallel else 1
        hidden = torch.empty(sequence // shares, batch, shape.hidden_size)
        dist.recv(hidden, group=group, group_src=stage - 1)
        model.set_input_tensor(hidden)
    output = model(ids, positions, None)
    if stage < stages - 1:
        dist.send(output.contiguous(), group=group, group_dst=stage + 1)
        return None
    return gather_from_tensor_model_parallel_region(output)[..., : shape.vocab_size].numpy()


class _Reading:
    """Counts the bytes of the tensors that a reader returns: all of them, and the most that were alive at once."""

    def __init__(self) -> None:
        self.total = self.alive = self.peak = 0

    def of(self, read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*arguments: Any) -> torch.Tensor:
            found = read(*arguments)
            size = found.numel() * found.itemsize
            self.total += size
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(found, self._gone, size)
            return found

        return counted

    def _gone(self, size: int) -> None:
        self.alive -= size


class _Allocating(TorchDispatchMode):
    """Counts the bytes of the storages that operations make: the most that were alive at once.

    beside_files: leaves out tensors that lie in a mapped file.
    The profiler's memory events would not do: they miss what gloo's threads let go of.
    """

    def __init__(self, known: list[torch.Tensor], beside_files: bool = False) -> None:
        super().__init__()
        self.uses = Counter(t.untyped_storage().data_ptr() for t in known)
        self.beside_files, self.alive, self.peak = beside_files, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not (self.beside_files and _is_mapped(tensor)):
                self._made(tensor)
        return result

    def _made(self, tensor: torch.Tensor) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if not self.uses[place]:
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self.uses[place] += 1
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.uses[place] -= 1
        if not self.uses[place]:
            self.alive -= size


def _is_mapped(tensor: torch.Tensor) -> bool:
    place = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, stop = (int(address, 16) for address in line.split()[0].split("-"))
            if start <= place < stop:
                return True
    return False


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except (UserError, ValueError) as error:
        return str(error)
    return "no error"
