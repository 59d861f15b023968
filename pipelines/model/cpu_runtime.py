"""Megatron-Core on a host without a GPU.

Megatron names the device "cuda" in its code, also where the work itself runs anywhere. `install` answers each such
request with the CPU: one TorchFunctionMode for tensors, and a CPU meaning for the few `torch.cuda` functions that
Megatron calls. It is called by a stage, once per process, before a model is built; importing this module does nothing.
NeMo's own needs are in trainer/cpu_runtime.py.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False
_is_initialized = torch.cuda.is_initialized


def install() -> None:
    """Idempotent. For a process that has no GPU or was told to use the CPU."""
    global _installed
    if _installed:
        return
    _installed = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.device_count = lambda: 1
    cuda.is_initialized = lambda: True
    cuda.Stream = cuda.Event = _Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.current_stream = lambda *args: _Nothing()
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.reset_peak_memory_stats = lambda *args, **kwargs: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.FloatTensor = torch.FloatTensor
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _CudaMeansCpu().__enter__()

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def is_installed() -> bool:
    return _installed


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """For code that names no device and is timed or compiled: no work at each call, torch's own word on GPUs."""
    installed = torch.cuda.is_initialized
    torch.cuda.is_initialized = _is_initialized
    try:
        with torch._C.DisableTorchFunction():
            yield
    finally:
        torch.cuda.is_initialized = installed


def _names_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        to_device = func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | int | torch.device)
        if to_device and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's gradient clipping asserts that gradients have the type "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _Nothing:
    """A CUDA stream or event where there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *args: Any) -> None: ...
