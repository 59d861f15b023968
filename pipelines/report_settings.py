"""The settings of the report and of the decision. Types, units and meaning; values live in conf/*.yaml. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Of each run that a report compares.
COMPARED = ("evaluate/results.json", "distil/metrics.jsonl", "export/quantized.json", "prune/search.json")


@dataclass
class ReportConfig:
    """runs: stage=report then puts them side by side, in <run.directory>/comparisons/<name>, and stage=decide decides
    between the variants of all of them."""

    runs: list[str] = field(default_factory=list)  # names in run.directory, or directories; empty: the run itself
    name: str | None = None  # of the comparison; None: the names of its runs, joined by +


@dataclass
class DecideConfig:
    """What the variant to take must keep; None: any."""

    bytes: float | None = None  # at most, of the weights on disk
    loss_below: float | None = None  # nats/token on the evaluated split
    tokens_per_second: float | None = None  # at least, as the runs measured it


def compares(config: Any, stage: str) -> bool:
    """Whether the stage is a report on several runs, which belongs to none of them."""
    return stage == "report" and bool(config.report.runs)


def run_of(config: Any, name: str) -> Path:
    """The directory of a run of report.runs."""
    return Path(name) if "/" in name else Path(config.run.directory) / name


def comparison_directory(config: Any) -> Path:
    name = config.report.name or "+".join(run_of(config, run).name for run in config.report.runs)
    return Path(config.run.directory) / "comparisons" / name


def compared_files(config: Any) -> list[Path]:
    """What a comparison reads; some of it may be missing."""
    return [run_of(config, run) / file for run in config.report.runs for file in COMPARED]
