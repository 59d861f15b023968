"""Learned projections from a student's hidden states into its teacher's, one for each loss that needs one.

They are trained and saved with the student and are no part of it: no export knows them. Replicated over the
tensor-parallel group, and drawn from a seed and the loss's name alone, so that no layout changes them.
"""

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from pipelines.signals import FeatureLoss, projection_sizes


class Read(torch.nn.Module):
    """Parameters that are read without a forward pass of their own module. Calling this gives them.

    Megatron's DistributedDataParallel gathers weights over the data-parallel ranks while the forward pass runs, and
    waits for those of a module when it is called: what is read past its module's call may still be the last step's.
    """

    def __init__(self, *parameters: torch.nn.Parameter) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters):
            self.register_parameter(str(number), parameter)

    def forward(self) -> list[Tensor]:
        return list(self.parameters())


class Projection(torch.nn.Module):
    """y = x @ factors[0].T (@ factors[1].T): one factor (teacher width, student width), or two of rank r."""

    def __init__(self, config: TransformerConfig, sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> None:
        """sizes: (out, in) of each factor; entries are drawn with variance 1 / in, which keeps the states' size."""
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        factors = []
        for out_width, in_width in sizes:
            drawn = torch.randn(out_width, in_width, generator=generator) / math.sqrt(in_width)
            factor = torch.nn.Parameter(drawn.to(device=device, dtype=config.params_dtype))
            # Under sequence parallelism each rank sees its part of the tokens: Megatron sums these gradients over TP.
            factor.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            factors.append(factor)
        self.factors = Read(*factors)

    def forward(self) -> list[Tensor]:
        """The factors."""
        factors: list[Tensor] = self.factors()
        return factors


def build_projections(
    config: TransformerConfig, losses: Sequence[FeatureLoss], *, teacher_width: int, seed: int
) -> torch.nn.ModuleDict:
    """{loss name: Projection} for the losses on hidden states that need one. config: the student's."""
    projections = torch.nn.ModuleDict()
    for loss in losses:
        sizes = projection_sizes(loss, config.hidden_size, teacher_width)
        if not sizes:
            continue
        generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(loss.name.encode()))
        projections[loss.name] = Projection(config, sizes, generator)
    return projections


def sharded_state_dict(projections: torch.nn.ModuleDict, prefix: str) -> dict[str, object]:
    """For Megatron's distributed checkpoints: the same tensor on every rank that has it."""
    return dict(make_sharded_tensors_for_checkpoint(dict(projections.named_parameters()), prefix))


def gather_projections(
    projections: torch.nn.ModuleDict, value: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, list[Tensor]]:
    """{loss name: value of each factor, on the CPU} of every pipeline stage, on every rank; for small models.

    One all-gather of objects over all ranks.
    """
    own = {n: [value(p).detach().cpu().clone() for p in module.parameters()] for n, module in projections.items()}
    everyone: list[dict[str, list[Tensor]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, own)
    return {name: factors for part in everyone for name, factors in part.items()}
