"""What evaluate reads besides the split: texts of other domains, and longer sequences."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from pipelines import elsewhere
from pipelines.config import Config, Layout, SourceKind, expect
from pipelines.families import ModelShape
from pipelines.files import read_object

WITHOUT_PATH = (SourceKind.standard_library, SourceKind.package_descriptions)


def check(config: Config, stages: Collection[str], ranks: Layout, teacher: ModelShape) -> None:
    """A domain's file is looked at when it is read: one that is not there is a gap, and the others go on."""
    if "evaluate" not in stages:
        return
    for place, domain in enumerate(config.evaluate.domains):
        setting = f"evaluate.domains[{place}]"
        plain = bool(re.fullmatch(r"[A-Za-z0-9_-]+", domain.name))
        expect(plain, f"{setting}.name", "letters, digits, - and _", repr(domain.name), "Name it, as in name: law.")
        if domain.source in WITHOUT_PATH:
            kind = f"none with source={domain.source.value}"
            expect(domain.path is None, f"{setting}.path", kind, domain.path, "Drop one.")
        else:
            expect(bool(domain.path), f"{setting}.path", "a path", "none", "Give the file or directory.")
    twice = [name for name, count in Counter(d.name for d in config.evaluate.domains).items() if count > 1]
    expect(not twice, "evaluate.domains", "a name for each", f"{', '.join(twice)} more often", "Rename one.")
    _check_baseline(config)
    setting, lengths = "evaluate.long_context", config.evaluate.long_context
    expect(len(set(lengths)) == len(lengths), setting, "each length once", lengths, "Drop one.")
    for length in lengths:
        window, engine = teacher.sliding_window, elsewhere.installed("transformer_engine")
        expected = f"at most the sliding window {window} without Transformer Engine"
        expect(not window or window >= length or engine, setting, expected, length, "Shorten it.")
        if ranks.sequence_parallel:
            expected = f"multiples of parallel.tensor={ranks.tensor} under sequence parallelism"
            remedy = "Change it, or parallel.sequence_parallel=false."
            expect(length % ranks.tensor == 0, setting, expected, length, remedy)


def _check_baseline(config: Config) -> None:
    """What can be told before anything is measured; evaluation/drift.py holds the text itself to it."""
    evaluate, path = config.evaluate, config.evaluate.baseline
    if path is None:
        return
    setting, remedy = f"evaluate.baseline={path}", "Give runs/NAME/evaluate/results.json, or a copy of one."
    expect(Path(path).is_file(), setting, "an evaluation's results.json", "no such file", remedy)
    stored = read_object(Path(path), remedy)
    whole = isinstance(stored.get("models"), dict) and isinstance(stored.get("document_groups"), dict)
    expect(whole, setting, "an evaluation's results.json", "no models or document_groups in it", remedy)
    for name in ("split", "sequence_length"):
        found, asked = stored.get(name), getattr(evaluate, name)
        expect(found == asked, setting, f"one with {name}={asked}", found, f"Give another, or set evaluate.{name}.")


def warnings(config: Config, stages: Collection[str], teacher: ModelShape) -> Iterator[str]:
    beyond = [length for length in config.evaluate.long_context if length > teacher.max_position_embeddings]
    if "evaluate" in stages and beyond:
        yield (
            f"evaluate.long_context: {', '.join(map(str, beyond))} is beyond the teacher's max_position_embeddings="
            f"{teacher.max_position_embeddings}: the models were not made for these positions"
        )
