"""Which implementation of chunk.Kernels works on which device. Triton is imported only where it is chosen."""

import functools
import importlib.util
import os
from typing import Literal

import torch

from pipelines.core import chunk
from pipelines.core.chunk import Kernels

Implementation = Literal["triton", "torch"]


def kernels_for(device: torch.device | str, implementation: Implementation | None = None) -> tuple[Kernels, str]:
    """The kernels for tensors on `device`, and what they are in words, for the log of a run: "Triton 3.7.1".

    implementation None: Triton on an NVIDIA or AMD GPU, plain torch elsewhere; plain torch also on a GPU where Triton
    is not installed, and then the words say so. "triton": on a GPU, or on any device where TRITON_INTERPRET=1 was in
    the environment before Triton was first imported, which is for tests: it takes milliseconds for a row.
    Raises ValueError where Triton is asked for and cannot be had.
    """
    return _kernels_for(torch.device(device).type, implementation)


@functools.cache
def _kernels_for(device_type: str, implementation: Implementation | None) -> tuple[Kernels, str]:
    plain: Kernels = chunk
    if implementation == "torch" or (implementation is None and device_type != "cuda"):
        return plain, "plain torch"
    if importlib.util.find_spec("triton") is None:
        if implementation is None:
            return plain, "plain torch, slower than Triton, which is not installed"
        raise ValueError("kernels: expected Triton, found none. pip install triton, or choose plain torch.")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not interpreted:
        raise ValueError(
            f"kernels: expected a GPU for Triton, found {device_type}. Choose plain torch, or for a test set "
            "TRITON_INTERPRET=1 before the start."
        )
    from pipelines.core import triton_kernels

    kernels: Kernels = triton_kernels
    return kernels, f"Triton {triton_kernels.triton.__version__}{', interpreted' if interpreted else ''}"
