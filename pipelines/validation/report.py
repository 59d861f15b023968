"""The runs that a report or a decision compares: whether they are there, and where the comparison goes."""

import difflib
from collections.abc import Collection
from pathlib import Path

from pipelines import artifacts
from pipelines.config import Config, expect
from pipelines.report_settings import run_of
from pipelines.stages import PIPELINE

LONGEST_NAME = 200  # bytes; file systems take 255


def check(config: Config, stages: Collection[str]) -> None:
    if not {"report", "decide"} & set(stages) or not config.report.runs:
        return
    runs = config.report.runs
    for place, name in enumerate(runs):
        setting, directory = f"report.runs[{place}]", run_of(config, name)
        made = any((directory / stage / "manifest.json").is_file() for stage in PIPELINE)
        remedy = "Name a run of run.directory, or a run's directory."
        close = difflib.get_close_matches(name, _runs(Path(config.run.directory)), n=2, cutoff=0.5)
        if close:
            remedy = f"Did you mean {' or '.join(close)}?"
        expect(made, setting, "a run with at least one stage", f"none in {directory}", remedy)
        first = next(other for other in runs if run_of(config, other).resolve() == directory.resolve())
        expect(runs.index(first) == place, setting, "each run once", f"{name} again", "Leave one out.")
    if "report" in stages:
        expect(len(runs) > 1, "report.runs", "two runs or more to compare", f"{len(runs)}", "Name another.")
        name = artifacts.stage_directory(config, "report").name
        plain = "/" not in (config.report.name or "") and name not in ("", ".", "..", "comparisons")
        expect(plain, "report.name", "a name without /", repr(config.report.name), "Change it.")
        found = f"{len(name.encode())} bytes"
        expect(
            len(name.encode()) <= LONGEST_NAME,
            "report.name",
            f"at most {LONGEST_NAME} bytes",
            found,
            "Give a short one.",
        )


def _runs(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
