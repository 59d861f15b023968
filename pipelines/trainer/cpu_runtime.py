"""NeMo on a host without a GPU: what model/cpu_runtime.py is for Megatron. Called before a Trainer is built."""

from typing import Any

from pipelines.model import cpu_runtime


def install() -> None:
    """Idempotent."""
    cpu_runtime.install()
    import nemo.lightning.io.pl as checkpoint_io

    # NeMo moves loaded tensors to the current CUDA device; here they are where they belong.
    checkpoint_io._fix_tensors_device = _as_it_is


def _as_it_is(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint
