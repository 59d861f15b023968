"""What runs in the ranks of test_synchronization.py."""

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.model import parallel
from pipelines.model.step import run_micro_batches, wrap
from tests.model.cases_signals import DEEP, build, losses_of
from tests.model.cases_step import STUDENT, TEACHER, build_pair, random_batches, write_models

aten = torch.ops.aten
# Each needs a value, or a number of values, on the host before the next line can run.
WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """Collects the operations for which a program on a GPU would wait, with the lines that called them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet, masked = func.overloadpacket, False
        if packet in INDEXING:
            masked = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
            # One value wherever a mask says so is a fill, whose places nobody has to count.
            masked = masked and (packet is aten.index or args[2].numel() > 1)
        if packet in WAITING or masked or (packet is aten.repeat_interleave and "output_size" not in (kwargs or {})):
            where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            self.found.append(f"{func} from {', '.join(where[-6:])}")
        return func(*args, **(kwargs or {}))


def waits_of_a_step(
    directory: Path, tensor: int, hidden: bool = False, attention: bool = False, **settings: Any
) -> list[str]:
    """The operations that would wait, from the first micro batch's start to the end of the last one's backward.

    hidden, attention: with losses on these. settings: attributes of the pair, such as TAID's share.
    """
    parallel.initialize(tensor)
    write_models(directory, STUDENT, DEEP if hidden or attention else TEACHER)
    if hidden or attention:
        pair = build(directory, STUDENT, losses_of(STUDENT, hidden, attention, False), {})
    else:
        pair = build_pair(directory, STUDENT, TEACHER, {}, kd_weight=0.7, ce_weight=0.3, temperature=2.0)
    for name, value in settings.items():
        setattr(pair, name, value)
    model = wrap(pair)
    pair.config.finalize_model_grads_func = lambda *_, **__: None  # once per optimizer step, after what is looked at
    batches = random_batches(2, 1, STUDENT.vocab_size)[0]
    model.train()
    model.zero_grad_buffer()
    with Waits() as waits:
        run_micro_batches(model, batches, forward_only=False)
    assert all(p.main_grad.abs().sum() > 0 for p in pair.parameters() if p.requires_grad)
    return waits.found


def what_waits() -> dict[str, int]:
    """How many operations are collected, by what is done."""
    x, mask = torch.arange(6.0), torch.arange(6) % 2 == 0
    done = {
        "item": lambda: x.sum().item(),
        "if": lambda: bool(x.sum() > 0),
        "nonzero": lambda: mask.nonzero(),
        "masked_select": lambda: x.masked_select(mask),
        "chosen by a mask": lambda: x[mask],
        "values where a mask says so": lambda: x.__setitem__(mask, torch.ones(3)),
        "a value where a mask says so": lambda: x.__setitem__(mask, 0.0),
        "where": lambda: torch.where(mask, x, 0.0),
        "chosen by numbers": lambda: x[torch.tensor([1, 2])],
    }
    found = {}
    for name, action in done.items():
        with Waits() as waits:
            action()
        found[name] = len(waits.found)
    return found
