"""Scores that are given, and settings of scoring without effect."""

from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines import artifacts, scores_origin
from pipelines.choices import Aggregation, Importance
from pipelines.config import Config
from pipelines.families import ModelShape
from pipelines.prune_settings import PruneConfig


def check(config: Config, stages: Collection[str], teacher: ModelShape) -> None:
    """prune.scores: a whole file, of this teacher where it is there already, with what will be ranked by it."""
    if "prune" not in stages or config.student.path or not config.prune.scores:
        return
    file, needed = Path(config.prune.scores), scores_origin.needed(config, teacher)
    scores_origin.read_origin(file)
    if needed and artifacts.is_hugging_face(artifacts.teacher_directory(config)):
        scores_origin.check_given(file, scores_origin.asked(config, data=False), needed, teacher)


def warnings(config: Config, stages: Collection[str], teacher: ModelShape) -> Iterator[str]:
    settings, usual = config.prune, PruneConfig()
    if "prune" not in stages or config.student.path:
        return
    needed = scores_origin.needed(config, teacher)
    if settings.scores and not needed and not scores_origin.measures_removals(config):
        yield "prune.scores has no effect: nothing is ranked by scores"
    if settings.sequence_aggregation is not Aggregation.mean and settings.importance is not Importance.activation:
        yield f"prune.sequence_aggregation has no effect with prune.importance={settings.importance.value}"
    if settings.sample_aggregation is not usual.sample_aggregation and settings.importance is Importance.random:
        yield "prune.sample_aggregation has no effect with prune.importance=random"
    channels, _ = scores_origin.ranked(config, teacher)
    if settings.importance is not usual.importance and not channels:
        yield f"prune.importance={settings.importance.value} has no effect: no channels, heads or KV groups are ranked"
