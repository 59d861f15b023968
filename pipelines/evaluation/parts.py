"""The parts of an evaluation: each is measured once, kept in a file of its own, and may be a gap with a reason."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from pipelines import console, files
from pipelines.artifacts import StageContext, read_manifest
from pipelines.config import UserError
from pipelines.model.parallel import on_first_rank

DIRECTORY = "parts"  # of the stage's directory; outlives overwrite=true, since every file says what it was made from

OF_A_PART = frozenset(
    {"task_files", "prompts", "domain_files", "baseline"}
)  # inputs that the part which reads them has among its settings, as hashes


class Parts:
    """What one run of the stage evaluate measures, part by part.

    <stage>/parts/<name>.json holds {"made_from": hash, "result": ...}. A part that is there and was made from the same
    settings, models and corpus is taken, so that a killed stage goes on behind the last whole part, and a change to one
    part's settings repeats that part alone. missing: {part: reason} of those that could not be measured.
    """

    def __init__(self, context: StageContext) -> None:
        self._directory = context.directory / DIRECTORY
        inputs = read_manifest(context.directory).get("inputs")
        self._inputs = inputs and {
            name: entry["files"] for name, entry in inputs.items() if name.partition("[")[0] not in OF_A_PART
        }
        self.missing: dict[str, str] = {}

    def measure(
        self, name: str, settings: dict[str, Any], work: Callable[[], dict[str, Any]], *, needed: bool = False
    ) -> dict[str, Any] | None:
        """What `work` returns (JSON), or an earlier run's where it was made from the same; None for a gap.

        A result's "missing", {piece: reason}, becomes gaps of their own, <name>.<piece>; that part is not taken again.

        settings: all that decides the result beside the stage's inputs. work: called on every rank; its result is taken
        from rank 0. A user's mistake, which it must raise on every rank, becomes the part's reason in `missing` and
        the others go on; `needed`: it ends the stage.

        Every rank calls it; two barriers over all ranks beside what `work` does.
        """
        path = self._directory / f"{name}.json"
        made_from = self._made_from(name, settings)
        kept = on_first_rank(lambda: _read(path, made_from)) if self._inputs is not None else None
        if kept is not None:
            console.say(f"evaluate  {name}: taken from {path}")
            return kept
        try:
            result = work()
        except UserError as error:
            if needed:
                raise
            self.missing[name] = str(error)
            console.say(f"evaluate  no {name}: {error}")
            return None
        gaps = result.pop("missing", {})
        for piece, reason in gaps.items():
            self.missing[f"{name}.{piece}"] = reason
            console.say(f"evaluate  no {name}.{piece}: {reason}")
        return on_first_rank(lambda: _keep(path, None if gaps else made_from, result))

    def pieces(self, name: str) -> "Pieces":
        """Of the part `name`."""
        return Pieces(self._directory / name, self._inputs)

    def _made_from(self, name: str, settings: dict[str, Any]) -> str:
        return _hash({"part": name, "settings": settings, "inputs": self._inputs})


class Pieces:
    """What a long part has measured so far: <stage>/parts/<part>/<piece>.json, each written as soon as it is there by
    the rank that measured it, with what it was made from. No collectives."""

    def __init__(self, directory: Path, inputs: dict[str, Any] | None) -> None:
        self._directory, self._inputs = directory, inputs

    def measure(
        self, piece: str, settings: dict[str, Any], reads: Collection[str], work: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What `work` returns, or an earlier run's where it was made from the same settings and the same inputs.

        reads: names of the stage's inputs (artifacts.INPUTS) that decide the piece.
        """
        path = self._directory / f"{piece}.json"
        inputs = None if self._inputs is None else {name: self._inputs.get(name) for name in reads}
        made_from = _hash({"piece": piece, "settings": settings, "inputs": inputs})
        kept = _read(path, made_from) if inputs is not None else None
        return kept if kept is not None else _keep(path, made_from, work())


def _hash(origin: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(origin, sort_keys=True, default=files.plain).encode()).hexdigest()


def _read(path: Path, made_from: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = files.read_object(path, "Remove it.")
    return found.get("result") if found.get("made_from") == made_from else None


def _keep(path: Path, made_from: str | None, result: dict[str, Any]) -> dict[str, Any]:
    """As it is read again: keys are text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, {"made_from": made_from, "result": result})
    return files.read_object(path)["result"]
