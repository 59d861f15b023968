"""search.json: what a search for the student's shape has measured, written whole after every measurement.

source          what its losses depend on; a search of another source starts anew; one of which "distillation" alone
                differs distils anew
teacher         {"loss": of the calibration sequences, nats/token}
sensitivities   {axis: {size: loss with this axis alone pruned, minus the teacher's}}; of attention heads with all
                KV groups
candidates      {name: {"shape", "parameters", "bytes_per_gpu", "tokens_per_second", "predicted", "measured", ...}}
                of those measured; of those followed also "validation" and "task", or "distilled"

and, of the last search alone, which takes what is known from those before it, whatever their limits or layout were:

limits, values  of its grid; within: how many candidates keep the limits; speeds: where their speeds come from
measured        the names of the candidates that it compares
winner, why
"""

import json
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pipelines import console, files
from pipelines.model import parallel

NAME = "search.json"
FOLLOWED = ("distilled", "task")  # of a candidate, what depends on source["distillation"]
LASTING = ("source", "teacher", "sensitivities", "candidates")  # from search to search


class SearchFile:
    """The file as every rank sees it: with the numbers of the first rank. Every rank calls its methods alike.

    directory: the stage's. What lies there of a search of another source (candidates/, hf/) is removed; training
    checkpoints are moved aside with their candidates.
    """

    def __init__(self, directory: Path, source: dict[str, Any]) -> None:
        self.path, plain = directory / NAME, json.loads(json.dumps(source, default=files.plain))

        def read() -> dict[str, Any]:
            held = files.read_object(self.path, "Remove it.") if self.path.is_file() else {}
            known = len(held.get("candidates") or {})
            if held.get("source") == plain:
                console.say(f"search  continues from {self.path}, where {known:,} candidates are measured")
                return held
            if held and _of_losses(held.get("source")) == _of_losses(plain):
                console.say(f"search  takes the losses of {known:,} candidates from {self.path}; distils anew")
                found = _without_followed(held) | {"source": plain}
            else:
                if held:
                    console.say(f"search  {self.path} is of other settings or inputs: the search starts anew")
                found = {"source": plain}
            _clear(directory)
            files.write_json(self.path, found)
            return found

        self.content: dict[str, Any] = parallel.on_first_rank(read)

    def begin(self, head: dict[str, Any]) -> None:
        """A search begins, or goes on: its figures of the grid replace what is there of the last one alone. One barrier
        over all ranks."""

        def write() -> dict[str, Any]:
            content = {name: self.content[name] for name in LASTING if name in self.content} | head
            files.write_json(self.path, content)
            return content

        self.content = parallel.on_first_rank(write)

    def get(self, *place: str) -> Any:
        """What stands at a place; None where nothing does."""
        found: Any = self.content
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def put(self, place: Sequence[str], value: Any) -> Any:
        """Write the first rank's value, which is returned, then raise Stopped where the run was asked to stop. Two
        barriers over all ranks."""

        def write() -> Any:
            self._set(place, value)
            files.write_json(self.path, self.content)
            return value

        found = parallel.on_first_rank(write)
        self._set(place, found)
        parallel.stop_where_asked(str(self.path))
        return found

    def once(self, place: Sequence[str], measure: Callable[[], Any]) -> Any:
        """What stands at the place, else what is measured now."""
        held = self.get(*place)
        return self.put(place, measure()) if held is None else held

    def _set(self, place: Sequence[str], value: Any) -> None:
        holder = self.content
        for key in place[:-1]:
            holder = holder.setdefault(key, {})
        holder[place[-1]] = value


def _of_losses(source: Any) -> Any:
    """What the losses inside the teacher depend on."""
    return {k: v for k, v in source.items() if k != "distillation"} if isinstance(source, dict) else None


def _without_followed(content: dict[str, Any]) -> dict[str, Any]:
    candidates = {
        name: {key: value for key, value in entry.items() if key not in FOLLOWED}
        for name, entry in content.get("candidates", {}).items()
    }
    return content | {"candidates": candidates}


def _clear(directory: Path) -> None:
    """Away with what an earlier search has sliced; aside with what it has trained."""
    followed = directory / "candidates"
    if any(followed.glob("*/checkpoints")):
        kept = directory / f"candidates.{datetime.now():%Y%m%d-%H%M%S}"
        followed.rename(kept)
        console.say(f"search  moved {followed} to {kept}")
    for name in ("candidates", "hf"):
        shutil.rmtree(directory / name, ignore_errors=True)
