"""Runs on the pool of ranks: the prune stage, its measurements counted and on demand cut off."""

from typing import Any
from unittest import mock

from pipelines.pruning.loaded_teacher import LoadedTeacher
from tests.stages import cases_prune


def run(fail_after: int | None = None, **arguments: Any) -> tuple[dict[str, Any] | str, int]:
    """(figures, or what it died of; measurements). fail_after: dies instead of one more measurement than these."""
    count = 0

    def counted(real: Any) -> Any:
        def measure(*given: Any, **named: Any) -> Any:
            nonlocal count
            if count == fail_after:
                raise KeyError("killed")
            count += 1
            return real(*given, **named)

        return measure

    with (
        mock.patch.object(LoadedTeacher, "loss", counted(LoadedTeacher.loss)),
        mock.patch.object(LoadedTeacher, "task", counted(LoadedTeacher.task)),
    ):
        try:
            return cases_prune.run(**arguments), count
        except KeyError as error:
            return str(error), count
