"""Which channels, neurons, KV groups, heads and layers stay: pure functions from scores to kept indices.

Indices are sorted ascending, so that what stays keeps its order. Of equal scores the lowest index stays first. Indices
of channels, neurons, groups and heads count from 0, layers from 1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pipelines.config import UserError
from pipelines.core.importance import Scores
from pipelines.protection import NOTHING, Protected


@dataclass(frozen=True)
class Kept:
    """What stays of a teacher.

    hidden: channels, one set for the whole model; ffn, heads and groups: by the teacher's layer number (from 1), for
    kept layers; layers: the teacher's layer numbers, in the order of the student. groups: KV groups; heads are numbered
    as Hugging Face's query projection, group by group, and are those of kept groups alone, the same number in each.
    """

    hidden: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    layers: list[int]
    groups: dict[int, list[int]]


def select_channels(
    scores: torch.Tensor, keep: int, *, what: str = "channels", protected: Iterable[int] = ()
) -> list[int]:
    """The `keep` highest of scores: (channels,), the protected among them. what: the setting's name in the errors."""
    check_target(what, keep, len(scores))
    first = sorted(set(protected))
    if len(first) > keep:
        raise UserError(
            f"{what}: expected room for the {len(first)} that prune.protect names, found {keep}. Raise it, or protect "
            "fewer."
        )
    ranked = scores.clone()
    ranked[first] = torch.inf
    order = torch.sort(ranked, descending=True, stable=True).indices
    return sorted(order[:keep].tolist())


def select_heads(
    scores: torch.Tensor,
    keep: int,
    groups: int,
    *,
    kept_groups: Sequence[int] | None = None,
    protected: Iterable[int] = (),
) -> list[int]:
    """The highest of scores: (heads,) within each KV group that stays, the same number in each, `keep` in all.

    Heads are numbered as Hugging Face's query projection: group by group. groups: the teacher's; kept_groups: all
    where None.
    """
    chosen = range(groups) if kept_groups is None else kept_groups
    check_heads(keep, len(scores), groups, len(chosen))
    per_group, wanted = len(scores) // groups, set(protected)
    rows = scores.view(groups, per_group)
    return [
        group * per_group + head
        for group in chosen
        for head in select_channels(
            rows[group],
            keep // len(chosen),
            what="heads per KV group",
            protected=[head for head in range(per_group) if group * per_group + head in wanted],
        )
    ]


def select_layers(
    layers: int,
    *,
    keep: int | None = None,
    drop: Sequence[int] | None = None,
    scores: torch.Tensor | None = None,
    protected: Iterable[int] = (),
) -> list[int]:
    """Layer numbers that stay, counted from 1: all but `drop`, or the `keep` of highest scores: (layers,)."""
    check_layers(layers, keep=keep, drop=drop)
    if drop:
        against = sorted(set(drop) & set(protected))
        if against:
            raise UserError(
                f"student.drop_layers: expected no layer that prune.protect names, or that holds what it names, found "
                f"{against}. Drop others, or protect fewer."
            )
        return [number for number in range(1, layers + 1) if number not in drop]
    if keep is None or keep == layers:
        return list(range(1, layers + 1))
    assert scores is not None and len(scores) == layers
    places = [number - 1 for number in protected]
    return [i + 1 for i in select_channels(scores, keep, what="student.num_hidden_layers", protected=places)]


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
    keep_groups: int | None = None,
    keep_layers: int | None = None,
    drop_layers: Sequence[int] | None = None,
    protected: Protected = NOTHING,
) -> Kept:
    """Every selection of one pruning; None keeps all. scores may be None where nothing has to be ranked.

    keep_groups without keep_heads: every head of the groups that stay.
    """
    of_layers = None if scores is None else scores.block_influence if scores.layers is None else scores.layers
    numbers = select_layers(
        layers, keep=keep_layers, drop=drop_layers, scores=of_layers, protected=protected.all_layers
    )
    per_group, nothing = heads // groups, frozenset[int]()
    left = groups if keep_groups is None else keep_groups
    in_all = left * per_group if keep_heads is None else keep_heads
    check_heads(in_all, heads, groups, left)

    def highest(size: int, keep: int | None, ranked: torch.Tensor | None, what: str, named: frozenset[int]) -> list:
        if keep is None or keep == size:
            return list(range(size))
        check_target(f"student.{what}", keep, size)
        assert ranked is not None
        return select_channels(ranked, keep, what=f"student.{what}", protected=named)

    def of_layer(ranked: torch.Tensor | None, number: int) -> torch.Tensor | None:
        return None if ranked is None else ranked[number - 1]

    ranked_groups = None if scores is None else scores.kv_groups
    kept_groups = {
        n: highest(
            groups,
            keep_groups,
            of_layer(ranked_groups, n),
            "num_key_value_heads",
            protected.groups_of(n, per_group),
        )
        for n in numbers
    }

    def kept_heads(number: int) -> list[int]:
        chosen = kept_groups[number]
        if in_all == left * per_group:
            return [group * per_group + head for group in chosen for head in range(per_group)]
        assert scores is not None
        named = protected.heads.get(number, nothing)
        return select_heads(scores.heads[number - 1], in_all, groups, kept_groups=chosen, protected=named)

    hidden, ffn = (scores.hidden, scores.ffn) if scores is not None else (None, None)
    return Kept(
        hidden=highest(hidden_size, keep_hidden, hidden, "hidden_size", protected.hidden),
        ffn={
            n: highest(ffn_size, keep_ffn, of_layer(ffn, n), "intermediate_size", protected.ffn.get(n, nothing))
            for n in numbers
        },
        heads={n: kept_heads(n) for n in numbers},
        layers=numbers,
        groups=kept_groups,
    )


def check_target(what: str, keep: int, size: int) -> None:
    """Raises UserError where the target is larger than the teacher, or empty."""
    if keep > size:
        raise UserError(f"{what}: expected at most the teacher's {size}, found {keep}. Pruning makes a model smaller.")
    if keep < 1:
        raise UserError(f"{what}: expected at least 1, found {keep}. Take a number from 1 to {size}.")


def check_heads(keep: int, heads: int, groups: int, kept_groups: int | None = None) -> None:
    """Raises UserError where the target is larger than what the groups that stay have, or not the same in each.

    heads, groups: the teacher's. kept_groups: all where None.
    """
    left = groups if kept_groups is None else kept_groups
    check_target("student.num_key_value_heads", left, groups)
    check_target("student.num_attention_heads", keep, heads)
    most = left * (heads // groups)
    if keep % left or keep > most:
        below, above = min(keep // left * left, most), -(-keep // left) * left
        remedy = " or ".join(str(value) for value in (below, above) if 0 < value <= most)
        whose = f"the teacher's {groups}" if left == groups else f"the {left}"
        raise UserError(
            f"student.num_attention_heads: expected a multiple of {whose} KV groups (each keeps the same number of "
            f"heads, at most the teacher's {heads // groups}), found {keep}. Take {remedy}."
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
