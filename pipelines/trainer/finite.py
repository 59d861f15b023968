"""Stopping every rank with the same message where a number is not finite."""

from collections.abc import Mapping

import torch

from pipelines.config import UserError


def refuse_non_finite(finite: Mapping[str, bool], step: int) -> None:
    """finite: {what: whether it is on this rank}. Raises the same UserError on every rank where one rank's is not.

    One MAX all-reduce over all ranks. The names must be the same on every rank.
    """
    flags = torch.tensor([not good for good in finite.values()], dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    if found := [what for what, flag in zip(finite, flags.tolist(), strict=True) if flag]:
        raise UserError(
            f"training: expected finite numbers, found a {' and a '.join(found)} that is not at step {step}. No "
            "checkpoint was written after it. Start the stage again with a lower learning rate and overwrite=true."
        )
