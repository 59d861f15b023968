"""A teacher that computes what its student would, before anything is cut: masks instead of slices.

Inside `pruned` dropped layers are skipped, and what is dropped of the others is 0 where it would be read:

    neurons, heads    at the input of the down and output projections
    hidden channels   at the outputs of the embedding and of both projections, so in the whole residual stream

Each RMSNorm of the teacher then sees H channels of which h are not 0, where the student's would see h:

    x / sqrt(sum x^2 / h + eps) = x / sqrt(sum x^2 / H + eps * h / H) * sqrt(h / H)

so its weight is multiplied by sqrt(h / H) and its eps by h / H. No matrix is copied or written to: what a measurement
costs beside the forward pass is the activations' masks and a copy of the norms' weights.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from pipelines.core.selection import Kept
from pipelines.families import ModelShape


@contextmanager
def pruned(model: GPTModel, kept: Kept, teacher: ModelShape) -> Iterator[None]:
    """Inside, `model` computes what the student sliced by `kept` would, at any TP x SP x PP.

    Afterwards it is as before, bit for bit, after an exception too. Not to be entered twice. No collectives; every rank
    enters with the same kept.

    model: this rank's pipeline stage of the whole teacher, of shape `teacher`; a stage may lose all of its layers.
    Without gradients of the norms' weights: these are scaled in place, in their own dtype. So with bf16 weights the
    results differ from the sliced student's by bf16's rounding where hidden channels are dropped, and only there.
    """
    with ExitStack() as undo:
        layers = _skip_layers(model, kept, undo)
        for layer in layers:
            number = layer.layer_number
            heads = [head * teacher.head_dim + c for head in kept.heads[number] for c in range(teacher.head_dim)]
            query = teacher.num_attention_heads * teacher.head_dim
            _mask_input(layer.self_attention.linear_proj, heads, query, undo)
            _mask_input(layer.mlp.linear_fc2, kept.ffn[number], teacher.intermediate_size, undo)
        if len(kept.hidden) < teacher.hidden_size:
            _mask_hidden(model, layers, kept.hidden, teacher.hidden_size, undo)
        yield


def _skip_layers(model: GPTModel, kept: Kept, undo: ExitStack) -> list[Any]:
    """This stage's kept layers, which alone are run."""
    block = model.decoder
    every = block.layers
    assert len(every) == block.num_layers_per_pipeline_rank, "expected a whole teacher, found one that is pruned"
    layers = [layer for layer in every if layer.layer_number in set(kept.layers)]
    if len(layers) < len(every):
        undo.callback(setattr, block, "num_layers_per_pipeline_rank", len(every))
        undo.callback(setattr, block, "layers", every)
        block.layers = torch.nn.ModuleList(layers)
        block.num_layers_per_pipeline_rank = len(layers)
    return layers


def _mask_input(linear: torch.nn.Module, kept: list[int], size: int, undo: ExitStack) -> None:
    """Zero what is not kept of a row-parallel product's input: (sequence, batch, size / tp), this rank's shard."""
    if len(kept) == size:
        return
    shard = size // parallel_state.get_tensor_model_parallel_world_size()
    first = shard * parallel_state.get_tensor_model_parallel_rank()
    away = _away(linear, kept, size)[first : first + shard]

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].masked_fill(away, 0), *inputs[1:]

    undo.callback(linear.register_forward_pre_hook(hook).remove)


def _mask_hidden(model: GPTModel, layers: list[Any], kept: list[int], size: int, undo: ExitStack) -> None:
    """Zero the residual stream (..., hidden) where it is written, and let each norm take the mean of what is kept."""
    share = len(kept) / size
    writers = [linear for layer in layers for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2)]
    norms = [
        (linear, "layer_norm_weight") for la in layers for linear in (la.self_attention.linear_qkv, la.mlp.linear_fc1)
    ]
    if model.pre_process:
        writers.append(model.embedding)
    if model.post_process:
        norms.append((model.decoder.final_layernorm, "weight"))
    for writer in writers:
        undo.callback(writer.register_forward_hook(_masking_output(_away(writer, kept, size))).remove)
    for norm, name in norms:
        weight, eps = getattr(norm, name).data, norm.eps
        assert eps == model.config.layernorm_epsilon, "expected a whole teacher, found one that is pruned"
        undo.callback(weight.copy_, weight.clone())
        undo.callback(setattr, norm, "eps", eps)
        weight.mul_(share**0.5)
        norm.eps = eps * share


def _masking_output(away: Tensor) -> Callable[..., Any]:
    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # of a linear: (product, bias), and there is no bias
            return output[0].masked_fill(away, 0), *output[1:]
        return output.masked_fill(away, 0)

    return hook


def _away(module: torch.nn.Module, kept: list[int], size: int) -> Tensor:
    """(size,) bool on the module's device, True at what is not kept."""
    away = torch.ones(size, dtype=torch.bool, device=next(module.parameters()).device)
    away[torch.tensor(kept, dtype=torch.int64, device=away.device)] = False
    return away
