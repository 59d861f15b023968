"""What pruning must leave in place, and whether a target has room for it. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.config import expect
from pipelines.families import ModelShape
from pipelines.prune_settings import OfLayerConfig, ProtectConfig

_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Protected:
    """What stays however it is scored: layers from 1; channels, neurons, heads and KV groups from 0, the latter three
    by the teacher's layer.

    A head keeps its KV group; a neuron, head or group keeps its layer.
    """

    layers: frozenset[int] = _NONE
    hidden: frozenset[int] = _NONE
    ffn: Mapping[int, frozenset[int]] = field(default_factory=dict)
    heads: Mapping[int, frozenset[int]] = field(default_factory=dict)
    groups: Mapping[int, frozenset[int]] = field(default_factory=dict)

    @property
    def all_layers(self) -> frozenset[int]:
        return self.layers | self.ffn.keys() | self.heads.keys() | self.groups.keys()

    def groups_of(self, layer: int, heads_per_group: int) -> frozenset[int]:
        """Of one layer: those that are named, and those of its protected heads."""
        return self.groups.get(layer, _NONE) | {head // heads_per_group for head in self.heads.get(layer, _NONE)}


NOTHING = Protected()


def protected(settings: ProtectConfig) -> Protected:
    def by_layer(entries: Sequence[OfLayerConfig]) -> dict[int, frozenset[int]]:
        return {entry.layer: frozenset(entry.indices) for entry in entries}

    return Protected(
        layers=frozenset(settings.layers),
        hidden=frozenset(settings.hidden),
        ffn=by_layer(settings.ffn),
        heads=by_layer(settings.heads),
        groups=by_layer(settings.kv_groups),
    )


def check(settings: ProtectConfig, teacher: ModelShape, target: ModelShape, dropped: Sequence[int] = ()) -> None:
    """Raises UserError for what the teacher does not have, what is named twice, and what the target has no room for.

    dropped: layers that are to go, from 1.
    """
    layers, setting = teacher.num_hidden_layers, "prune.protect"
    _check_numbers(f"{setting}.layers", settings.layers, 1, layers)
    _check_numbers(f"{setting}.hidden", settings.hidden, 0, teacher.hidden_size - 1)
    for name, entries, size in (
        ("ffn", settings.ffn, teacher.intermediate_size),
        ("heads", settings.heads, teacher.num_attention_heads),
        ("kv_groups", settings.kv_groups, teacher.num_key_value_heads),
    ):
        _check_numbers(f"{setting}.{name}", [entry.layer for entry in entries], 1, layers, "layers")
        for entry in entries:
            _check_numbers(f"{setting}.{name} of layer {entry.layer}", entry.indices, 0, size - 1)
    named = protected(settings)
    against = sorted(named.all_layers & set(dropped))
    expected = "no layer in which prune.protect names something"
    expect(not against, "student.drop_layers", expected, against, "Drop others, or protect fewer.")
    for name, needed in smallest(settings, teacher, target.num_key_value_heads).items():
        room = getattr(target, name)
        fits = room >= needed
        remedy = f"Raise student.{name}, or protect fewer."
        expect(fits, setting, f"at most the {room} of student.{name}", f"{needed} that stay", remedy)


def smallest(settings: ProtectConfig, teacher: ModelShape, kept_groups: int) -> dict[str, int]:
    """{size of config.json: the least that a student can have which keeps what is protected}.

    kept_groups: the student's KV groups, each of which has as many heads as the one with most protected ones.
    """
    named, per_group = protected(settings), teacher.num_attention_heads // teacher.num_key_value_heads
    in_a_group = [
        sum(head // per_group == group for head in heads)
        for heads in named.heads.values()
        for group in range(teacher.num_key_value_heads)
    ]
    groups = [len(named.groups_of(layer, per_group)) for layer in named.groups.keys() | named.heads.keys()]
    return {
        "hidden_size": len(named.hidden),
        "intermediate_size": max((len(neurons) for neurons in named.ffn.values()), default=0),
        "num_key_value_heads": max(groups, default=0),
        "num_attention_heads": kept_groups * max(in_a_group, default=0),
        "num_hidden_layers": len(named.all_layers),
    }


def _check_numbers(setting: str, numbers: Sequence[int], first: int, last: int, what: str = "numbers") -> None:
    wrong = sorted({number for number in numbers if not first <= number <= last})
    expect(not wrong, setting, f"{what} from {first} to {last}", wrong, "Remove them.")
    twice = sorted({number for number in numbers if list(numbers).count(number) > 1})
    expect(not twice, setting, "each once", f"{twice} more than once", "Name each once.")
