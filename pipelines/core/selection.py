"""Which channels, neurons, heads and layers stay: pure functions from scores to kept indices.

Indices are sorted ascending, so that what stays keeps its order. Of equal scores the lowest index stays first. Indices
of channels, neurons and heads count from 0, layers from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipelines.config import UserError
from pipelines.core.importance import Scores


@dataclass(frozen=True)
class Kept:
    """What stays of a teacher.

    hidden: channels, one set for the whole model; ffn and heads: by the teacher's layer number (from 1), for kept
    layers; layers: the teacher's layer numbers, in the order of the student.
    """

    hidden: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    layers: list[int]


def select_channels(scores: torch.Tensor, keep: int, *, what: str = "channels", multiple: int = 1) -> list[int]:
    """The `keep` highest of scores: (channels,). what: the setting's name in the errors."""
    check_target(what, keep, len(scores))
    if keep % multiple:
        raise UserError(
            f"{what}: expected a multiple of {multiple}, found {keep}. Take {max(keep // multiple, 1) * multiple}."
        )
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())


def select_heads(scores: torch.Tensor, keep: int, groups: int) -> list[int]:
    """The highest of scores: (heads,) within each KV group, the same number in each, `keep` in all.

    Heads are numbered as Hugging Face's query projection: group by group.
    """
    check_heads(keep, len(scores), groups)
    per_group = len(scores) // groups
    rows = scores.view(groups, per_group)
    return [
        group * per_group + head
        for group in range(groups)
        for head in select_channels(rows[group], keep // groups, what="heads per KV group")
    ]


def select_layers(
    layers: int,
    *,
    keep: int | None = None,
    drop: Sequence[int] | None = None,
    block_influence: torch.Tensor | None = None,
) -> list[int]:
    """Layer numbers that stay, counted from 1: all but `drop`, or the `keep` of highest block_influence: (layers,)."""
    check_layers(layers, keep=keep, drop=drop)
    if drop:
        return [number for number in range(1, layers + 1) if number not in drop]
    if keep is None or keep == layers:
        return list(range(1, layers + 1))
    assert block_influence is not None and len(block_influence) == layers
    return [index + 1 for index in select_channels(block_influence, keep, what="layers")]


def select(
    scores: Scores | None,
    *,
    hidden_size: int,
    ffn_size: int,
    heads: int,
    groups: int,
    layers: int,
    keep_hidden: int | None = None,
    keep_ffn: int | None = None,
    keep_heads: int | None = None,
    keep_layers: int | None = None,
    drop_layers: Sequence[int] | None = None,
    multiple: int = 1,
) -> Kept:
    """Every selection of one pruning; None keeps all. scores may be None where nothing has to be ranked.

    multiple: of the hidden size and of the neurons that stay.
    """
    influence = scores.block_influence if scores is not None else None
    numbers = select_layers(layers, keep=keep_layers, drop=drop_layers, block_influence=influence)

    def channels(size: int, keep: int | None, ranked: torch.Tensor | None, what: str) -> list[int]:
        if keep is None or keep == size:
            return list(range(size))
        check_target(what, keep, size)
        assert ranked is not None
        return select_channels(ranked, keep, what=what, multiple=multiple)

    def kept_heads(number: int) -> list[int]:
        if keep_heads is None or keep_heads == heads:
            return list(range(heads))
        check_heads(keep_heads, heads, groups)
        assert scores is not None
        return select_heads(scores.heads[number - 1], keep_heads, groups)

    return Kept(
        hidden=channels(hidden_size, keep_hidden, scores.hidden if scores else None, "student.hidden_size"),
        ffn={
            n: channels(ffn_size, keep_ffn, scores.ffn[n - 1] if scores else None, "student.intermediate_size")
            for n in numbers
        },
        heads={n: kept_heads(n) for n in numbers},
        layers=numbers,
    )


def check_target(what: str, keep: int, size: int) -> None:
    """Raises UserError where the target is larger than the teacher, or empty."""
    if keep > size:
        raise UserError(f"{what}: expected at most the teacher's {size}, found {keep}. Pruning makes a model smaller.")
    if keep < 1:
        raise UserError(f"{what}: expected at least 1, found {keep}. Take a number from 1 to {size}.")


def check_heads(keep: int, heads: int, groups: int) -> None:
    """Raises UserError where the target is larger than the teacher or not the same number in every KV group."""
    check_target("student.num_attention_heads", keep, heads)
    if keep % groups:
        below, above = keep // groups * groups, -(-keep // groups) * groups
        remedy = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"student.num_attention_heads: expected a multiple of the teacher's {groups} KV groups (each keeps the "
            f"same number of heads), found {keep}. Take {remedy}."
        )


def check_layers(layers: int, *, keep: int | None, drop: Sequence[int] | None) -> None:
    """Raises UserError where the drop list and the number of layers do not fit the teacher or each other."""
    if keep is not None:
        check_target("student.num_hidden_layers", keep, layers)
    if not drop:
        return
    wrong = sorted({number for number in drop if not 1 <= number <= layers})
    if wrong:
        raise UserError(
            f"student.drop_layers: expected numbers from 1 to {layers} (layers count from 1), found {wrong}. "
            "Remove them."
        )
    if len(set(drop)) != len(drop):
        twice = sorted({number for number in drop if list(drop).count(number) > 1})
        raise UserError(f"student.drop_layers: expected each layer once, found {twice} more than once. Name each once.")
    left = layers - len(drop)
    if left == 0:
        raise UserError(f"student.drop_layers: expected a layer to be left, found all {layers} dropped. Drop fewer.")
    if keep is not None and keep != left:
        raise UserError(
            f"student.drop_layers and student.num_hidden_layers disagree: expected {layers} - {len(drop)} = {left} "
            f"layers, found num_hidden_layers={keep}. Leave student.num_hidden_layers out, or set it to {left}."
        )
