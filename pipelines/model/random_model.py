"""A seeded random Hugging Face directory: where pretraining starts, the same at every layout."""

import hashlib
import math
from pathlib import Path

import torch

from pipelines.families import ModelShape, Tensor
from pipelines.model.hub_files import write_hub_files
from pipelines.model.safetensors_stream import Writer


def write_random_model(
    directory: str | Path,
    shape: ModelShape,
    seed: int,
    dtype: str = "float32",
    *,
    std: float = 0.02,
    tokenizer: str | Path | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Norms are 1; weights are drawn from N(0, std^2), those that write into the residual stream from
    N(0, std^2 / (2 * layers)) (GPT-2's scaling).

    dtype: "float32", "bfloat16" or "float16". Each tensor has a generator of its own from seed and name, so it depends
    on nothing else, and one tensor is held at a time. For one process: call it on rank 0 and wait for it.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    announced = {name: (size, torch_dtype) for name, size in shape.tensor_shapes().items()}
    with Writer(directory, announced, max_shard_bytes) as writer:
        write_hub_files(writer.partial, shape, torch_dtype, tokenizer)
        for name, tensor in shape.tensors().items():
            writer.write(name, _draw(name, tensor, shape, seed, std).to(torch_dtype))


def _draw(name: str, tensor: Tensor, shape: ModelShape, seed: int, std: float) -> torch.Tensor:
    size = tuple(shape.axis_size(axis) for axis in tensor.axes)
    if len(size) == 1:
        return torch.ones(size)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    # Rows that count "hidden" are outputs added to the residual stream.
    scale = std / math.sqrt(2 * shape.num_hidden_layers) if tensor.axes[0] == "hidden" else std
    return torch.empty(size).normal_(0.0, scale, generator=generator)
