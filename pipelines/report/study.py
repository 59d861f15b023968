"""The tables and the plot of a study (launchers/study.py), from what its runs left on disk. No torch."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pipelines.files import write_atomic
from pipelines.report import plots

Comparison = tuple[str, str, str]  # what is asked, the arm expected to be better, the other


@dataclass(frozen=True)
class Arm:
    """Figures of the test split, one per seed, in the order of the seeds. Losses in nats/token."""

    title: str
    parameters: int
    pruned: tuple[float, ...]
    student: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Study:
    teacher: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]


def read(directory: Path, titles: Mapping[str, str], seeds: Sequence[int]) -> Study:
    """The arms of which every seed has been evaluated, in <directory>/<arm>_<seed>/evaluate/results.json."""
    arms: dict[str, Arm] = {}
    teacher: dict[str, Any] = {}
    for name, title in titles.items():
        files = [directory / f"{name}_{seed}" / "evaluate" / "results.json" for seed in seeds]
        if not all(file.is_file() for file in files):
            continue
        models = [json.loads(file.read_text())["models"] for file in files]
        teacher = models[0]["teacher"]
        sizes = {found["student"]["parameters"] for found in models}
        assert len(sizes) == 1, f"{name}: students of {sizes} parameters"
        arms[name] = Arm(
            title,
            sizes.pop(),
            tuple(found["pruned"]["loss"] for found in models),
            tuple(found["student"]["loss"] for found in models),
            tuple(found["student"]["kl"] for found in models),
        )
    return Study(teacher, arms, tuple(seeds))


def write(study: Study, comparisons: Sequence[Comparison], page: Path, plot: str, block: str = "figures") -> None:
    """The figures of the page between <!-- block --> and <!-- /block -->, and plot.png beside it; all else stays."""
    page.parent.mkdir(parents=True, exist_ok=True)
    losses = {f"{arm.title}\n{arm.parameters:,}": arm.student for arm in study.arms.values()}
    plots.repeated(losses, ("teacher", study.teacher["loss"]), "test loss, nats/token", plot, page.parent)
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    text = page.read_text() if page.exists() else "# Results\n"
    if start not in text:
        text = f"{text}\n{start}\n{end}\n"
    before, _, rest = text.partition(start)
    after = rest.partition(end)[2]
    write_atomic(page, f"{before}{start}\n{figures(study, comparisons, plot)}\n{end}{after}")


def figures(study: Study, comparisons: Sequence[Comparison], plot: str) -> str:
    """Both tables in Markdown."""
    whole, loss = study.teacher["parameters"], study.teacher["loss"]
    lines = [
        f"{date.today()}, {len(study.seeds)} seeds. Teacher: {whole:,} parameters, {loss:.4f} nats/token on the test "
        "split. Losses in nats/token; ± is the standard deviation over the seeds.",
        "",
        "| student | parameters | loss before distilling | loss after | KL to teacher |",
        "|---|---|---|---|---|",
    ]
    for arm in study.arms.values():
        size = f"{arm.parameters:,} ({arm.parameters / whole:.1%})"
        lines.append(f"| {arm.title} | {size} | {_spread(arm.pruned)} | {_spread(arm.student)} | {_spread(arm.kl)} |")
    lines += ["", "| question | difference in loss after distilling | seeds | answer |", "|---|---|---|---|"]
    for question, better, other in comparisons:
        if better in study.arms and other in study.arms:
            lines.append(_compared(question, study.arms[better], study.arms[other]))
    return "\n".join(lines + ["", f"![losses by student and seed]({plot}.png)"])


def _compared(question: str, better: Arm, other: Arm) -> str:
    differences = [a - b for a, b in zip(better.student, other.student, strict=True)]
    wins = sum(difference < 0 for difference in differences)
    answer = "as expected" if wins == len(differences) else "the other way" if wins == 0 else "not told apart"
    return f"| {question} | {_spread(differences, sign='+')} | {wins} of {len(differences)} | {answer} |"


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 and len(set(values)) > 1 else mean
