"""The search for the student's shape: from a grid within limits to one winner, ever fewer candidates ever more closely.

    alone     each size of each axis that a candidate has is pruned by itself inside the loaded teacher
              (model/masking.py); what its loss is above the teacher's, a sensitivity, counts for every candidate with
              this size, and the sum of its axes' predicts a candidate's loss
    together  the prune.search.measured candidates of lowest predicted loss are measured in the same way as they are
    followed  the prune.search.candidates best of these are sliced to candidates/<name>/hf and distilled by the run's
              own settings for prune.search.distil_tokens; without these they are measured on validation text instead,
              and nothing is sliced but the winner
    winner    the lowest validation loss, or the highest task score; of equal ones the smallest

At `together` and `followed` the first places are those of the best candidate of each number of layers. Everything that
is measured goes into search.json at once (pruning/search_file.py): a search that was stopped goes on there, and one
within other limits, on another grid or at another layout measures only what is not known yet.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipelines import artifacts, console, files, grid, speeds
from pipelines.choices import Measure
from pipelines.config import distils_candidates, layout
from pipelines.core.selection import Kept
from pipelines.families import ModelShape, read_shape
from pipelines.grid import Candidate
from pipelines.model import parallel
from pipelines.model.export import save_hugging_face
from pipelines.model.slicing import slice_checkpoint
from pipelines.prune_settings import PRUNED_SIZES
from pipelines.pruning import speed
from pipelines.pruning.loaded_teacher import LoadedTeacher, free
from pipelines.pruning.ranking import alone, ordered, spread, winner
from pipelines.pruning.search_file import SearchFile
from pipelines.questions import TaskScore

OF_THE_GRID = ("student.", "prune.target.", "prune.multiples.", "prune.search.")  # settings, no loss depends on them
OF_DISTILLATION = ("distil.", "run.", "prune.search.by", "prune.search.distil_tokens")
OF_TRAINING = ("ce", "kd", "agreement")  # what is kept of the last validation


class Search:
    """One search. Every rank makes one, at the layout of prune (sequences whole), and calls `run`.

    keep: what stays of the teacher for a shape. The stage's directory gets search.json, candidates/ and speed.json.
    """

    def __init__(
        self, context: artifacts.StageContext, loaded: LoadedTeacher, keep: Callable[[ModelShape], Kept]
    ) -> None:
        self.context, self.config, self.loaded, self.keep = context, context.config, loaded, keep
        self.settings, self.home = context.config.prune.search, context.directory / "candidates"
        self.teacher, self.ranks, self.directory = loaded.shape, loaded.ranks, loaded.directory
        self.file = SearchFile(context.directory, self._source())

    def run(self) -> ModelShape:
        """The winner's shape. Where it was sliced, hf/ is the winner."""
        candidates = self._candidates()
        for layers in sorted({candidate.shape.num_hidden_layers for candidate in candidates}):
            self.keep(self.teacher.replace(num_hidden_layers=layers))  # may measure, with a bar of its own
        above = self._alone(candidates)
        predicted = {c.name: self._predicted(c) for c in candidates}
        measured = spread(ordered(candidates, predicted, above), self.settings.measured)
        self.file.put(["measured"], [c.name for c in measured])
        losses = {c.name: self._together(c, predicted[c.name]) for c in measured}
        followed = spread(ordered(measured, losses, above), self.settings.candidates)
        for candidate in followed:
            self._sliced(candidate)
            if not distils_candidates(self.config):
                self._compared(candidate)
        self.loaded.release()
        if distils_candidates(self.config):
            for candidate in followed:
                self._distilled(candidate)
        found = self._winner(followed)
        parallel.on_first_rank(lambda: self._settle(found.name))
        return found.shape

    def figures(self) -> dict[str, Any]:
        """For the stage's manifest."""
        name = self.file.get("winner")
        return {
            "winner": name,
            "why": self.file.get("why"),
            "within_limits": self.file.get("within"),
            "measured": len(self.file.get("measured") or []),
            "candidate": self.file.get("candidates", name),
        }

    # The grid

    def _source(self) -> dict[str, Any]:
        """What the losses depend on: settings and files, neither the grid nor the layout; those after distillation also
        on its settings."""
        inputs, settings = artifacts.read_manifest(self.context.directory).get("inputs", {}), self.context.settings()
        distillation = {name: value for name, value in settings.items() if name.startswith(OF_DISTILLATION)}
        others = {name: value for name, value in settings.items() if name not in distillation}
        return {
            "settings": {
                name: value
                for name, value in others.items()
                if name == "student.drop_layers" or not name.startswith(OF_THE_GRID)
            },
            "files": {name: entry["files"] for name, entry in inputs.items()},
            "teacher": str(self.directory),
            "distillation": distillation,
        }

    def _candidates(self) -> list[Candidate]:
        table = self.context.directory / "speed.json"
        measured = self.settings.speed == speeds.MEASURED
        if measured and grid.limits(self.config, self.teacher).seconds is not None:
            free = replace(self.config.prune.target, seconds=None, tokens_per_second=None)
            unbound = replace(self.config, prune=replace(self.config.prune, target=free))
            found, _ = grid.candidates(unbound, self.ranks, self.teacher)
            speed.measure(self.config, self.ranks, self.teacher, [c.shape for c in found], table)
        known = speeds.speeds(self.config, self.ranks, self.teacher, table if table.is_file() and measured else None)
        found, values = grid.candidates(self.config, self.ranks, self.teacher, known)
        head = {"limits": grid.described(self.config, self.teacher), "within": len(found), "values": dict(values)}
        self.file.begin(head | {"speeds": known.source if known else self.settings.speed})
        console.say(
            f"search  {len(found):,} candidates within the limits, up to {found[0].parameters:,} of "
            f"{self.teacher.parameters():,} parameters"
        )
        return found

    # Losses inside the teacher

    def _alone(self, candidates: list[Candidate]) -> float:
        """Measure what is not known of the axes by themselves. Returns the teacher's loss."""
        whole = self.file.once(["teacher"], lambda: {"loss": self.loaded.loss(self.keep(self.teacher))})["loss"]
        shapes: dict[tuple[str, str], ModelShape] = {}
        for candidate in candidates:
            shapes |= alone(self.teacher, candidate.shape)
        missing = [place for place in sorted(shapes) if self.file.get("sensitivities", *place) is None]
        if missing:
            with console.progress("search  axes", len(missing), "sizes") as bar:
                for axis, size in missing:
                    change = self.loaded.loss(self.keep(shapes[axis, size])) - whole
                    self.file.put(["sensitivities", axis, size], change)
                    bar.advance(1, detail=f"{axis} {size}: {change:+.4f} nats/token")
        return float(whole)

    def _predicted(self, candidate: Candidate) -> float:
        changes = [self.file.get("sensitivities", *place) for place in alone(self.teacher, candidate.shape)]
        return float(self.file.get("teacher", "loss") + sum(changes))

    def _together(self, candidate: Candidate, predicted: float) -> float:
        """The candidate's loss, all axes pruned; and its size and speed at this layout."""
        place = ["candidates", candidate.name]
        held = self.file.get(*place) or {}
        entry = {
            "shape": {axis: getattr(candidate.shape, axis) for axis in PRUNED_SIZES},
            "parameters": candidate.parameters,
            "bytes_per_gpu": candidate.bytes_per_gpu,
            "tokens_per_second": self._speed(candidate),
            "predicted": predicted,
        }
        if "measured" not in held:
            loss = self.loaded.loss(self.keep(candidate.shape))
            entry["measured"] = loss
            console.say(
                f"search  {candidate.name:<28}{candidate.parameters:>15,} parameters  loss {loss:.4f}, "
                f"predicted {predicted:.4f}"
            )
        if held != held | entry:
            held = self.file.put(place, held | entry)
        return float(held["measured"])

    def _speed(self, candidate: Candidate) -> float | None:
        """tokens/s, measured now where speeds are measured and were not needed before."""
        tokens = speeds.pass_tokens(self.config)
        if candidate.seconds is not None or self.settings.speed != speeds.MEASURED:
            return candidate.tokens_per_second(tokens)
        table = self.context.directory / "speed.json"
        speed.measure(self.config, self.ranks, self.teacher, [candidate.shape], table)
        known = speeds.speeds(self.config, self.ranks, self.teacher, table)
        return tokens / known.seconds(candidate.shape) if known else None

    # The followed

    def _sliced(self, candidate: Candidate) -> None:
        """candidates/<name>/hf, where it is yet to be distilled or is to be kept."""
        distilled = self.file.get("candidates", candidate.name, "distilled") is not None
        if not self.settings.keep_candidates and (distilled or not distils_candidates(self.config)):
            return
        kept, where = self.keep(candidate.shape), self.home / candidate.name / "hf"

        def slice_() -> None:
            if not artifacts.is_hugging_face(where):
                slice_checkpoint(self.directory, where, self.teacher, kept)

        parallel.on_first_rank(slice_)

    def _compared(self, candidate: Candidate) -> None:
        """Without distillation: the loss on validation text, or the task's score."""
        kept, place = self.keep(candidate.shape), ["candidates", candidate.name]
        if self.file.get(*place, "validation") is None:
            loss = self.file.put([*place, "validation"], self.loaded.loss(kept, "validation"))
            console.say(f"search  {candidate.name:<28}loss on validation text {loss:.4f}")
        if self.settings.by is Measure.task:
            self.file.once([*place, "task"], lambda: self._told(candidate, self.loaded.task(kept)))

    def _told(self, candidate: Candidate, score: TaskScore) -> float:
        """The accuracy that counts."""
        found = score.counted(self.config.prune.task_normalised)
        console.say(f"search  {candidate.name:<28}accuracy {found:.2%}")
        return found

    def _distilled(self, candidate: Candidate) -> None:
        """Distil for a while, continued from its own last checkpoint. At the layout of distil, and back."""
        place = ["candidates", candidate.name, "distilled"]
        config, own, keeps = self.config, self.home / candidate.name, self.settings.keep_candidates
        there = parallel.on_first_rank(lambda: artifacts.is_hugging_face(own / "distilled"))
        if self.file.get(*place) is not None and (there or not keeps):
            return
        ranks = layout(config.parallel)
        parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
        from pipelines.trainer.distillation import distil, shortened

        settings = shortened(config.distil, self.settings.distil_tokens)
        short = replace(config, distil=settings, run=replace(config.run, trackers=[]))
        context = artifacts.StageContext(short, self.context.stage, own)
        description = f"search  {candidate.name}"
        pair, found, _ = distil(context, teacher=self.directory, start=own / "hf", description=description)
        tokens = settings.steps * settings.global_batch_size * settings.sequence_length
        figures: dict[str, float] = {"steps": settings.steps, "tokens": tokens}
        figures |= {name: found[name] for name in OF_TRAINING if name in found}
        if self.settings.by is Measure.task:
            score = self._told(candidate, self.loaded.task_of(pair.student))
            self.file.put(["candidates", candidate.name, "task"], score)
        if keeps:
            tokenizer = artifacts.corpus_directory(config) / "tokenizer"
            save_hugging_face(pair.student, own / "distilled", candidate.shape, tokenizer=tokenizer)
        del pair
        free()
        ranks = self.ranks
        parallel.initialize(ranks.tensor, ranks.pipeline, ranks.context, device=ranks.device, seed=config.run.seed)
        self.file.put(place, figures)
        console.say(f"search  {candidate.name:<28}loss {found['ce']:.4f} after {tokens:,} tokens of distillation")

    # The winner

    def _figure(self, candidate: Candidate) -> float:
        """What decides: of text that neither selected nor trained."""
        entry = self.file.get("candidates", candidate.name)
        if self.settings.by is Measure.task:
            return float(entry["task"])
        return float(entry["distilled"]["ce"] if distils_candidates(self.config) else entry["validation"])

    def _winner(self, followed: list[Candidate]) -> Candidate:
        found, second, tied = winner(followed, self._figure, self.settings.by)
        what = "task score" if self.settings.by is Measure.task else "validation loss"
        after = " after distillation" if distils_candidates(self.config) else ""
        why = f"{found.name} has {what} {self._figure(found):.4f}{after}, {self._share(found)} of the teacher"
        if second is not None:
            against = f"{second.name} has {self._figure(second):.4f} and {self._share(second)}"
            why += f"; {against}" + (", which counts as equal: the smaller one wins" if tied else "")
        else:
            why += "; no other candidate was followed"
        self.file.put(["why"], why)
        self.file.put(["winner"], found.name)
        console.say(f"search  winner: {why}")
        return found

    def _share(self, candidate: Candidate) -> str:
        return f"{candidate.parameters:,} parameters, {candidate.parameters / self.teacher.parameters():.1%}"

    def _settle(self, name: str) -> None:
        """On one rank: the winner's weights to hf/; those of the others, and every checkpoint, go unless they are to
        be kept. May be called again after it was stopped anywhere."""
        source, target = self.home / name / "hf", self.context.directory / "hf"
        if artifacts.is_hugging_face(source):
            shutil.rmtree(target, ignore_errors=True)
            if self.settings.keep_candidates:
                with files.new_directory(target) as partial:
                    shutil.copytree(source, partial, dirs_exist_ok=True)
            else:
                source.rename(target)
        if not self.settings.keep_candidates:
            for left in ("hf", "checkpoints", "data_index"):
                for directory in self.home.glob(f"*/{left}"):
                    shutil.rmtree(directory)

    def has_sliced(self, shape: ModelShape) -> bool:
        """Whether hf/ is the winner, of this shape, already."""
        found = self.context.directory / "hf"
        return artifacts.is_hugging_face(found) and read_shape(found) == shape
