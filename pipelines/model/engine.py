"""What models are built from on this machine, chosen by what is there, in one line for the user."""

from importlib import metadata, util

import torch

from pipelines.model import adam
from pipelines.model.layers import uses_transformer_engine


def description() -> str:
    """Versions, layers and the optimizer that optimizer=auto takes, after torch.distributed is there."""
    te = f"Transformer Engine {_version('transformer-engine')}"
    device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU"
    parts = [
        f"Megatron-Core {_version('megatron-core')}, torch {torch.__version__}, {device}",
        f"layers: {te if uses_transformer_engine() else 'plain torch'}",
        f"optimizer: {adam.in_words(adam.chosen())}",
        f"Apex: {'there' if util.find_spec('apex') else 'none'}",
    ]
    return "; ".join(parts)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
