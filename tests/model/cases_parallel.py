"""Run in ranks: work of the first rank alone."""

import time
from typing import Any


def waited_for(seconds: float, limit: float) -> dict[str, Any]:
    """Rank 0 works longer than any collective may take."""
    import datetime

    import torch

    from pipelines.model import parallel

    set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
    set_timeout(datetime.timedelta(seconds=limit))
    try:
        found = parallel.on_first_rank(lambda: time.sleep(seconds) or {"rank": torch.distributed.get_rank()})
    finally:
        set_timeout(datetime.timedelta(minutes=30))
    return found


def failed(user: bool) -> str:
    from pipelines.config import UserError
    from pipelines.model import parallel

    def fail() -> None:
        raise UserError("a mistake") if user else OSError(28, "No space left on device")

    try:
        parallel.on_first_rank(fail)
    except (UserError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
