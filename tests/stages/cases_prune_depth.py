"""Runs on the pool of ranks: the prune stage, its measurements counted and on demand cut off."""

from typing import Any

from pipelines.pruning.removal import Measurement
from tests.stages import cases_prune


def run(fail_after: int | None = None, **arguments: Any) -> tuple[dict[str, Any] | str, int]:
    """(figures, or what it died of; measurements). fail_after: dies instead of one more measurement than these."""
    real, count = Measurement.__call__, 0

    def counted(*given: Any) -> Any:
        nonlocal count
        if count == fail_after:
            raise KeyError("killed")
        count += 1
        return real(*given)

    Measurement.__call__ = counted  # type: ignore[method-assign]
    try:
        return cases_prune.run(**arguments), count
    except KeyError as error:
        return str(error), count
    finally:
        Measurement.__call__ = real  # type: ignore[method-assign]
