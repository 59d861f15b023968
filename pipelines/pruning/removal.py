"""What it costs to leave layers out of a teacher: the loss and the task's score of the rest, before anything is cut.

Each set of layers is measured once, and the results are kept in scores.safetensors, whatever the target: `removed`
(n, layers) uint8, 1 where a layer is left out; `removed_loss` (n,), nats/token; `removed_task`,
`removed_task_normalised` (n,), accuracies from 0 to 1, and `removed_task_log_probability` (n,), nats; NaN where not
measured. What they were measured on stands in the metadata as "removal"; never the layout.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import artifacts, files, scores_origin
from pipelines.choices import Measure
from pipelines.config import Config, UserError
from pipelines.core.selection import Kept
from pipelines.families import ModelShape
from pipelines.model import parallel
from pipelines.pruning import scores_file
from pipelines.pruning.loaded_teacher import LoadedTeacher
from pipelines.questions import TaskScore, tokenizer_directory

Layers = tuple[int, ...]  # from 1, ascending
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what decides a question's ids


@dataclass(frozen=True)
class Cost:
    """Of what is left. loss: nats/token over the calibration sequences; task: of the questions; None: not measured."""

    loss: float | None = None
    task: TaskScore | None = None

    def has(self, measure: Measure) -> bool:
        return (self.loss if measure is Measure.loss else self.task) is not None

    def order(self, measure: Measure, normalised: bool = False) -> tuple[float, ...]:
        """What sorts costs, the least harm first. By task: by accuracy, then by the right choices' probability."""
        if measure is Measure.loss:
            assert self.loss is not None
            return (self.loss,)
        assert self.task is not None
        return (-self.task.counted(normalised), -self.task.log_probability)

    def words(self, measure: Measure, normalised: bool = False) -> str:
        if measure is Measure.loss:
            return f"loss {self.loss:.4f}"
        assert self.task is not None
        return f"accuracy {self.task.counted(normalised):.2%} (log-probability {self.task.log_probability:.4f})"


class Removals:
    """Costs of leaving layers out of a whole teacher. `removals(layers, measure)` measures what is not known yet.

    path: of scores.safetensors, written anew after each measurement, so that a killed search goes on where it was.
    sources: what decides the figures of each measure; what the file has of others is measured again. None for a measure
    that is not asked for, whose figures stay as they are. given: another file whose measurements of the same sources
    are taken over. Every rank makes one and calls it with the same layers in the same order: one barrier over all ranks
    at the start, two after each measurement, where a run that was asked to stop does.
    """

    def __init__(
        self,
        teacher: ModelShape,
        measure: Callable[[Kept, Measure], Cost],
        path: Path,
        sources: Mapping[str, Any],
        given: Path | None = None,
    ) -> None:
        self.teacher, self.path, self._measure = teacher, path, measure

        def read() -> list[Any]:
            used = _with_those_of_the_file(path, sources)
            found: dict[Layers, Cost] = {}
            for file in filter(None, (given, path)):
                for layers, cost in read_removals(file, used, teacher.num_hidden_layers).items():
                    found[layers] = merged(found.get(layers, Cost()), cost)
            costs = [[layers, cost.loss, vars(cost.task) if cost.task else None] for layers, cost in found.items()]
            return [used, costs]

        self.sources, costs = parallel.on_first_rank(read)
        self.known = {tuple(layers): Cost(loss, TaskScore(**task) if task else None) for layers, loss, task in costs}
        self.measured = 0

    def __call__(self, layers: Layers, measure: Measure) -> Cost:
        """layers: that are left out, from 1, ascending; none of them: the whole teacher."""
        known = self.known.get(layers, Cost())
        if known.has(measure):
            return known
        self.known[layers] = merged(known, self._measure(without(self.teacher, layers), measure))
        self.measured += 1
        parallel.on_first_rank(self._write)
        parallel.stop_where_asked(str(self.path))
        return self.known[layers]

    def _write(self) -> None:
        found = arrays(self.known, self.teacher.num_hidden_layers)
        scores_file.update(self.path, found, {"removal": self.sources})


def measured_inside(teacher: LoadedTeacher, samples: int) -> Callable[[Kept, Measure], Cost]:
    """Measures any `Kept` inside the teacher; samples: of the calibration split, for the loss. Collective."""

    def cost(kept: Kept, measure: Measure) -> Cost:
        if measure is Measure.loss:
            return Cost(loss=teacher.loss(kept, samples=samples))
        return Cost(task=teacher.task(kept))

    return cost


def without(teacher: ModelShape, layers: Layers) -> Kept:
    """All of a teacher but these layers, from 1."""
    numbers = [number for number in range(1, teacher.num_hidden_layers + 1) if number not in layers]
    return Kept(
        hidden=list(range(teacher.hidden_size)),
        ffn={number: list(range(teacher.intermediate_size)) for number in numbers},
        heads={number: list(range(teacher.num_attention_heads)) for number in numbers},
        layers=numbers,
        groups={number: list(range(teacher.num_key_value_heads)) for number in numbers},
    )


def merged(one: Cost, other: Cost) -> Cost:
    """The other's figures, and the one's where the other has none."""
    return Cost(one.loss if other.loss is None else other.loss, other.task or one.task)


# The file

_TASK = {
    "removed_task": "accuracy",
    "removed_task_normalised": "normalised",
    "removed_task_log_probability": "log_probability",
}


def arrays(costs: Mapping[Layers, Cost], layers: int) -> dict[str, torch.Tensor]:
    """As they stand in the file, in the order of `costs`."""
    removed = torch.zeros(len(costs), layers, dtype=torch.uint8)
    for row, left_out in enumerate(costs):
        removed[row, [number - 1 for number in left_out]] = 1
    columns = {"removed_loss": [math.nan if cost.loss is None else cost.loss for cost in costs.values()]}
    for name, figure in _TASK.items():
        columns[name] = [math.nan if cost.task is None else getattr(cost.task, figure) for cost in costs.values()]
    return {"removed": removed} | {name: torch.tensor(v, dtype=torch.float64) for name, v in columns.items()}


def read_removals(path: Path, sources: Mapping[str, Any], layers: int) -> dict[Layers, Cost]:
    """What the file has of the same sources; nothing where there is no file, or of others. Raises UserError where it is
    damaged."""
    if not path.is_file():
        return {}
    try:
        return _read_removals(path, sources, layers)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        expected = f"{path}: expected what leaving layers out costs in the arrays removed, removed_loss, "
        raise UserError(
            f"{expected}{', '.join(_TASK)} and their origin in the metadata, found them damaged. Remove the file, or "
            "give another one with prune.scores, to measure it again."
        ) from None


def _with_those_of_the_file(path: Path, sources: Mapping[str, Any]) -> dict[str, Any]:
    """The sources, and for a measure that is not asked for what the file says of this model's."""
    told = scores_file.read_notes(path).get("removal") if path.is_file() else {}
    models, found = [source["model"] for source in sources.values() if source], dict(sources)
    for name in (name for name, source in sources.items() if source is None):
        other = told.get(name) if isinstance(told, dict) else None
        found[name] = other if isinstance(other, dict) and other.get("model") in models else None
    return found


def _read_removals(path: Path, sources: Mapping[str, Any], layers: int) -> dict[Layers, Cost]:
    told = scores_file.read_notes(path).get("removal", {})
    same = {name for name, source in sources.items() if source and told.get(name) == source}
    if not same:
        return {}
    held = scores_file.read_arrays(path)
    removed, columns = held["removed"].bool(), {name: held[name].tolist() for name in ("removed_loss", *_TASK)}
    if removed.shape[1] != layers:
        return {}
    if {len(column) for column in columns.values()} != {len(removed)}:
        raise ValueError
    found = {}
    for row, mask in enumerate(removed):
        left_out = tuple((mask.nonzero().flatten() + 1).tolist())
        loss = columns["removed_loss"][row]
        task = TaskScore(**{figure: columns[name][row] for name, figure in _TASK.items()})
        cost = Cost(
            None if Measure.loss.value not in same or math.isnan(loss) else loss,
            None if Measure.task.value not in same or math.isnan(task.accuracy) else task,
        )
        if cost.loss is not None or cost.task is not None:
            found[left_out] = cost
    return found


def sources(config: Config, teacher: ModelShape, samples: int) -> dict[str, Any]:
    """{measure: what decides its figures}: hashes of files and settings, never the layout. For one process: it reads
    what has no hash yet."""
    origin, settings = scores_origin.asked(config), config.prune
    names = ("model", "data", "sequence_length", "precision", "document_mask")
    loss = {name: origin[name] for name in names} | {"samples": samples}
    task = None
    if settings.task:
        tokenizer = tokenizer_directory(config, artifacts.teacher_directory(config), teacher)
        read = {"task": Path(settings.task)} | {
            name: tokenizer / name for name in TOKENIZER if (tokenizer / name).is_file()
        }
        task = {name: origin[name] for name in ("model", "precision")}
        task |= {name: files.file_hash(path, artifacts.sidecar_directory(config)) for name, path in read.items()}
    return {Measure.loss.value: loss, Measure.task.value: task}
