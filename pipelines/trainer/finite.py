"""What one rank has seen, known to all: numbers that are not finite stop every rank with the same message."""

from collections.abc import Iterable, Mapping

import torch

from pipelines.config import UserError


class SharedError(UserError):
    """Raised by every rank in the same step, with the same message."""


def on_any_rank(flags: Mapping[str, bool]) -> set[str]:
    """The names whose flag is set on one rank or more, the same on every rank.

    One MAX all-reduce over all ranks. The names must be the same on every rank.
    """
    found = torch.tensor(list(flags.values()), dtype=torch.int32, device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return {name for name, flag in zip(flags, found.tolist(), strict=True) if flag}


def refuse_non_finite(finite: Mapping[str, bool], step: int) -> None:
    """finite: {what: whether it is on this rank}. Raises the same SharedError on every rank where one rank's is not.

    The collective of `on_any_rank`.
    """
    refuse(on_any_rank({what: not good for what, good in finite.items()}), step)


def refuse(found: Iterable[str], step: int) -> None:
    """found: what is not finite, the same on every rank. Raises SharedError where that is anything."""
    if names := sorted(found):
        raise SharedError(
            f"training: expected finite numbers, found a {' and a '.join(names)} that is not at step {step}. No "
            "checkpoint was written after it. Start the stage again with a lower learning rate and overwrite=true."
        )
