"""The benchmark: what it measures against the layout, and its own models."""

from collections.abc import Collection

from pipelines import planning
from pipelines.config import Config, Contender, Layout, expect
from pipelines.validation import layouts

STEPS = (Contender.stillhouse, Contender.nemo)  # who has a whole training step


def check(config: Config, stages: Collection[str], ranks: Layout) -> None:
    if "benchmark" not in stages:
        return
    settings = config.benchmark
    remedy = "The peers shard over the vocabulary alone: use parallel=tp1, tp2, ..."
    for name in ("pipeline", "context"):
        found = getattr(ranks, name)
        expect(found == 1, f"parallel.{name}", "1 in stage benchmark", found, remedy)
    for vocabulary in settings.vocabularies:
        divisor = f"multiples of parallel.tensor={ranks.tensor}, since not every peer pads"
        expect(vocabulary % ranks.tensor == 0, "benchmark.vocabularies", divisor, vocabulary, "Change it.")
    for first, second in (("tokens", "vocabularies"), ("vocabularies", "tokens")):
        both = bool(getattr(settings, first)) or not getattr(settings, second)
        expect(both, f"benchmark.{first}", f"some beside benchmark.{second}", "none", "Give both or neither.")
    some = bool(settings.tokens or settings.micro_batch_sizes or settings.scoring_micro_batch_sizes)
    expected = "tokens and vocabularies, micro_batch_sizes or scoring_micro_batch_sizes"
    expect(some, "benchmark", expected, "none of them", "Set some.")
    expect(bool(settings.contenders), "benchmark.contenders", "some", "none", "Name one or more.")
    teacher = planning.teacher_shape(config)
    if settings.micro_batch_sizes or settings.scoring_micro_batch_sizes:
        layouts.check_division(ranks, teacher, "teacher")
    if settings.micro_batch_sizes:
        layouts.check_division(ranks, planning.target_shape(teacher, config.student), "student")
