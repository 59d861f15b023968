"""A frozen model whose layers lie in host memory and come to the device one after the other, each ahead of its use.

Two buffers on the device, each of the largest layer's size, take turns: while one layer computes, the next one's
weights are copied into the other buffer on a stream of their own. After the last layer comes the first, for the next
forward pass. Embedding, final norm and head stay on the device.

On the CPU the same code copies, without streams: model/cpu_runtime.py gives them no meaning there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

_ALIGNMENT = 256  # bytes, as torch's own allocator; kernels ask for 16


class HostLayers:
    """The layers of a model on this pipeline stage, their parameters in host memory but while they compute.

    host: each layer's weights, bytes, pinned on a GPU. buffers: the two on the device.
    """

    def __init__(self, model: GPTModel) -> None:
        """Takes the layers of `model` off the device. Its weights are loaded, and nothing trains them.

        Their forward passes must come in their order, as a decoder's do. No collectives. Raises ValueError where a
        parameter wants a gradient or is not a plain tensor.
        """
        layers = list(model.decoder.layers)
        self.parameters = [list(layer.parameters()) for layer in layers]
        for parameter in (p for layer in self.parameters for p in layer):
            if parameter.requires_grad or type(parameter) is not torch.nn.Parameter:
                raise ValueError("offload: expected frozen parameters of plain tensors, found others.")
        device = self.parameters[0][0].device
        self.host = [torch.empty(_size(own), dtype=torch.uint8, pin_memory=True) for own in self.parameters]
        self.at_home = [_views(own, memory) for own, memory in zip(self.parameters, self.host, strict=True)]
        for parameters, views in zip(self.parameters, self.at_home, strict=True):
            for parameter, view in zip(parameters, views, strict=True):
                view.copy_(parameter.data)
            _point(parameters, views)
        largest = max(len(memory) for memory in self.host)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.visiting = [[_views(own, buffer) for own in self.parameters] for buffer in self.buffers]
        self.held: list[int | None] = [None, None]  # which layer each buffer has, or is being given
        self.slot = 0  # of the layer that computes, or computed last
        self.stream = torch.cuda.Stream()
        self.ready, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            layer.register_forward_hook(self._after(index))

    def _bring(self, index: int) -> None:
        """Start the copy of a layer into the buffer that no layer computes from, unless it is there."""
        if index in self.held:
            return
        slot = 1 - self.slot
        self.held[slot] = index
        memory = self.host[index]
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[slot])
            self.buffers[slot][: len(memory)].copy_(memory, non_blocking=True)
            self.ready[slot].record()

    def _before(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self._bring(index)
            self.slot = self.held.index(index)
            torch.cuda.current_stream().wait_event(self.ready[self.slot])
            _point(self.parameters[index], self.visiting[self.slot][index])
            self._bring((index + 1) % len(self.host))

        return hook

    def _after(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self.free[self.slot].record()
            _point(self.parameters[index], self.at_home[index])

        return hook


def _point(parameters: Sequence[Tensor], views: Sequence[Tensor]) -> None:
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view


def _size(parameters: Sequence[Tensor]) -> int:
    """Bytes of one piece of memory that holds them, each at an aligned place."""
    return sum(-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters)


def _views(parameters: Sequence[Tensor], memory: Tensor) -> list[Tensor]:
    """A view into `memory` for each parameter, of its shape and dtype."""
    views, start = [], 0
    for parameter in parameters:
        views.append(memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape))
        start += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views
