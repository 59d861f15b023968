"""The LightningModule that NeMo trains, and the reduction of its loss."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from pipelines.model import documents, step
from pipelines.model.windows import row_hashes
from pipelines.trainer.guard import Guard, LeftOut

_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class TrainedModel(GPTModel):
    """NeMo's GPTModel around a Megatron module built by `build`: a language model, or a student with its teacher.

    config: the very object that the built module carries as `config`: Megatron's schedule, NeMo's strategy and the
    optimizer each write into it what the others read (a copy would leave the gradients unreduced).
    guard: says whether the step at hand is left out. end_of_document: the id after which documents stand alone
    (model/documents.py); None: rows are whole.
    """

    def __init__(
        self,
        config: TransformerConfig,
        build: Callable[[], MegatronModule],
        optim: MegatronOptimizerModule,
        guard: Guard,
        end_of_document: int | None = None,
    ) -> None:
        super().__init__(config, optim=optim)
        self.build, self.guard, self.end_of_document = build, guard, end_of_document
        self._training_loss_reduction = LossReduction()
        self._validation_loss_reduction = LossReduction()

    def configure_model(self, vp_stage: int | None = None) -> None:
        if not hasattr(self, "module"):
            self.module = self.build()
            assert self.module.config is self.config, "NeMo and Megatron's schedule must share one config object"

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """By the names of a plain Megatron model, as checkpoints have them, under whatever wrappers: torch would go by
        the tree of submodules, where the student lies inside the pair."""
        own = {re.sub(r"^(module\.)+", "", name): value for name, value in state_dict.items()}
        return unwrap(self.module).load_state_dict(own, strict=strict)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        # After the callbacks, which hear of the step in any case.
        if self.guard.reason:
            raise LeftOut

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but for a step that is left out: gradients are computed, the optimizer never sees them."""
        with suppress(LeftOut):
            super().optimizer_step(*args, **kwargs)

    def data_step(self, dataloader_iter: Iterator[Any]) -> dict[str, torch.Tensor]:
        """One micro batch on this rank's device, cut to the rank's part of the sequence under context parallelism."""
        batch = next(dataloader_iter)
        batch = batch[0] if isinstance(batch, tuple) else batch
        batch = {key: batch[key] for key in _BATCH_KEYS}
        hashed = row_hashes(batch["tokens"])
        if self.end_of_document is not None:
            batch = documents.separated(batch, self.end_of_document)
        batch = get_batch_on_this_cp_rank(documents.moved(batch, torch.cuda.current_device()))
        if parallel_state.get_context_parallel_rank() == 0:  # each of these ranks has seen the whole rows
            batch["row_hashes"] = hashed
        return batch

    def forward_step(self, batch: dict[str, torch.Tensor]) -> Any:
        return step.forward(self.module, batch)


def unwrap(module: Any) -> MegatronModule:
    """The Megatron module inside DistributedDataParallel and Float16Module."""
    while isinstance(module, DistributedDataParallel | Float16Module):
        module = module.module
    return module


class LossReduction(MegatronLossReduction):
    """The loss function of model/step.py in NeMo's form, for one step's micro batches.

    `reduce` makes no collective and returns this data-parallel rank's mean, which NeMo logs: NeMo calls it on the last
    pipeline stage alone. The means over all ranks are `callbacks.Metrics`'.
    """

    def forward(self, batch: dict[str, torch.Tensor], forward_out: Any) -> step.Loss:  # type: ignore[override]
        return step.loss_function(batch, forward_out)

    def reduce(self, losses_reduced_per_micro_batch: Sequence[step.Report]) -> torch.Tensor:
        total = sum(report["loss"] for report in losses_reduced_per_micro_batch)
        tokens = sum(report["tokens"] for report in losses_reduced_per_micro_batch)
        return torch.as_tensor(total / tokens, dtype=torch.float32)
