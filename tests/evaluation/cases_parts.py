"""Runs on the pool of ranks: parts of an evaluation whose work is counted."""

from pathlib import Path
from typing import Any

from pipelines.artifacts import StageContext
from pipelines.config import Config, UserError
from pipelines.evaluation.parts import Parts
from pipelines.model import parallel


def measure(directory: str, turns: list[dict[str, Any]]) -> tuple[list[Any], dict[str, str], int]:
    """(results, gaps, times that the work ran on this rank) of one part per turn: name, settings, result or mistake."""
    parallel.initialize(1, 1, 1, device="cpu", seed=1)
    parts, ran = Parts(StageContext(Config(), "evaluate", Path(directory))), 0

    def work(turn: dict[str, Any]) -> dict[str, Any]:
        nonlocal ran
        ran += 1
        if "mistake" in turn:
            raise UserError(turn["mistake"])
        return turn["result"]

    found = []
    for turn in turns:
        found.append(
            parts.measure(
                turn["name"], turn.get("settings", {}), lambda turn=turn: work(turn), needed=turn.get("needed", False)
            )
        )
    return found, parts.missing, ran
