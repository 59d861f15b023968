"""Documents that share a row and see nothing of each other: attention and positions begin anew with each one.

A corpus joins its documents by an end-of-document token, and training cuts the stream into rows, wherever a document
may stand. `separated` turns such a batch into one row with the places where documents begin, as Megatron's and
Transformer Engine's "thd" layout has it. A row's first tokens may be the rest of a document that began in another row:
it counts as a document of its own.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from pipelines.model.layers import uses_transformer_engine

Batch = dict[str, Tensor]

CUMULATIVE_LENGTHS = "cu_seqlens"  # by its name in the kernels: (documents + 1,) int32, 0 first, the row's length last


def separated(batch: Batch, end_of_document: int) -> Batch:
    """One row of batch * sequence tokens in which each document stands alone, with "cu_seqlens". No collectives.

    batch: "tokens" and "loss_mask", (batch, sequence), on the CPU, where this is to be called: on the device the step
    would wait for the numbers; what else it holds is made one row too. A document begins with each row and after each
    end_of_document. position_ids count from 0 in each. loss_mask becomes 0 at each end_of_document, whose label is the
    first token of another document (what Megatron calls eod_mask_loss); the end itself is predicted like any token.
    """
    tokens = batch["tokens"]
    ends = tokens == end_of_document
    begins = torch.cat([torch.ones_like(ends[:, :1]), ends[:, :-1]], dim=1).flatten()
    starts = begins.nonzero().flatten()
    places = torch.arange(len(begins))
    found = {name: value.reshape(1, -1) for name, value in batch.items()}
    return found | {
        "loss_mask": (batch["loss_mask"] * ~ends).reshape(1, -1),
        "position_ids": (places - starts[begins.cumsum(0) - 1]).reshape(1, -1),
        CUMULATIVE_LENGTHS: torch.cat([starts, torch.tensor([len(begins)])]).int(),
    }


def moved(batch: Batch, device: torch.device | int) -> Batch:
    """The batch on a device, without waiting for it; the documents' lengths stay on the CPU for `packed_sequences`."""
    return {
        name: value if name == CUMULATIVE_LENGTHS else value.to(device, non_blocking=True)
        for name, value in batch.items()
    }


def packed_sequences(batch: Batch) -> PackedSeqParams | None:
    """What a GPTModel's forward takes as packed_seq_params; None for a batch of whole rows.

    Transformer Engine wants the lengths on the device, and plans its kernels by the longest one, here rounded up to a
    power of two. The plain layers slice by them and want them on the CPU.
    """
    lengths = batch.get(CUMULATIVE_LENGTHS)
    if lengths is None:
        return None
    longest = int(lengths.diff().max())
    if uses_transformer_engine():
        lengths = lengths.to(torch.cuda.current_device(), non_blocking=True)
        longest = 1 << (longest - 1).bit_length()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
