"""A run as a chain of jobs: which of its stages are left to do, and with what settings each. Imports no torch."""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pipelines import artifacts, gates, preflight
from pipelines.__main__ import not_needed, stage_names
from pipelines.choices import Device
from pipelines.cluster.script import Job, render
from pipelines.compose import compose, to_yaml
from pipelines.config import Config, UserError
from pipelines.elsewhere import Nodes, checked_for
from pipelines.iteration import Part, expand
from pipelines.stages import STAGES
from pipelines.validation import cluster as cluster_checks
from pipelines.validation import numbers, site, validate


class Chain:
    """The jobs of a command line, checked as the nodes will check them. Raises UserError.

    jobs: what is left to do, in order; left_out: why each other stage is not among them; warnings: settings without
    effect.
    """

    def __init__(self, overrides: Sequence[str]) -> None:
        asked = [*overrides]
        if not any(re.match(r"\+*stage=", override) for override in asked):
            asked.append("stage=all")
        submitted = compose(asked)
        self.cluster, self.here = submitted.cluster, Path.cwd()
        names = stage_names(submitted)
        for name in names:
            if not hasattr(self.cluster.stages, name):
                known = ", ".join(vars(self.cluster.stages))
                raise UserError(
                    f"stage={name}: expected some of {known}, found one that is no part of a chain. "
                    f"Use `python -m pipelines stage={name}`."
                )
        site.check_secrets(submitted)  # all that the jobs' own checks cannot see: cluster.* is not passed on to them
        numbers.check(submitted)
        cluster_checks.check(submitted, names)
        self.run, self.name = artifacts.run_directory(submitted).absolute(), submitted.run.name
        self.home = self.run / "slurm"
        self.asked = [
            *(o for o in asked if not re.match(r"\+*(stage=|cluster[.=]|run\.directory=)", o)),
            f"run.directory={_hydra(str(Path(submitted.run.directory).absolute()))}",
        ]
        self.largest = max((self._processes(name) for name in names if STAGES[name].takes_all_nodes), default=1)
        self.warnings = self._validate(names)
        self.jobs: list[Job] = []
        self.configs: list[Config] = []
        self.left_out: list[str] = []
        config = compose(self._overrides(Part(names[-1])))
        for number, part in enumerate(expand(config, names), start=1):
            self._add(number, part)
        self.unfit = self._unfit(submitted)

    def _processes(self, stage: str) -> int:
        nodes = cluster_checks.of_stage(self.cluster, stage)
        return (nodes.nodes or 1) * (nodes.processes_per_node or 1)

    def _overrides(self, part: Part) -> list[str]:
        """What `python -m pipelines` gets on the nodes, whose number decides that of the processes."""
        if STAGES[part.stage].takes_all_nodes:
            layout = [f"parallel.processes={self._processes(part.stage)}"]
        else:  # it has no ranks, and needs no GPU that the layout would ask for
            layout = [f"parallel.processes={self.largest}", "parallel.device=cpu"]
        return [*self.asked, *part.overrides, *layout, f"stage={part.stage}"]

    def _nodes(self, stage: str) -> Nodes:
        processes = self._processes(stage) if STAGES[stage].takes_all_nodes else self.largest
        gpus = cluster_checks.of_stage(self.cluster, stage).gpus_per_node or 0
        return Nodes(processes, gpus, self.cluster.image is not None)

    def _validate(self, names: list[str]) -> list[str]:
        """The stages that share a number of processes together, those without ranks beside each of them."""
        found: dict[str, None] = {}
        ranked = [name for name in names if STAGES[name].takes_all_nodes]
        for nodes, first in {self._nodes(name): name for name in reversed(ranked or names)}.items():
            alike = [name for name in names if not STAGES[name].takes_all_nodes or self._nodes(name) == nodes]
            with checked_for(nodes):
                found |= dict.fromkeys(validate(compose(self._overrides(Part(first))), alike))
        return list(found)

    def _unfit(self, config: Config) -> str:
        """Why the jobs could not use the GPUs that they ask for, where this machine's Python is theirs; else empty."""
        own = self.cluster.image is None and self.cluster.python in (None, sys.executable)
        if not own or config.parallel.device is Device.cpu or preflight.torch_cuda() is not None:
            return ""
        stages = dict.fromkeys(job.stage for job in self.jobs)
        asking = [name for name in stages if STAGES[name].takes_all_nodes and self._nodes(name).gpus]
        if not asking:
            return ""
        return (
            f"cluster.gpus_per_node: expected 0, or a torch that is built for CUDA, for {', '.join(asking)}; found "
            f"none for {sys.executable}. {preflight.FOR_CUDA}"
        )

    def _add(self, number: int, part: Part) -> None:
        overrides = self._overrides(part)
        config = compose(overrides)
        stage = STAGES[part.stage]
        place = f"step{part.step}-" if config.run.name != self.name else ""
        label = f"{number:02}-{place}{part.stage}"
        if reason := not_needed(config, part.stage) or self._finished(config, part):
            self.left_out.append(f"{label}: {reason}")
            return
        nodes = cluster_checks.of_stage(self.cluster, part.stage)
        directory = artifacts.stage_directory(config, part.stage)
        self.configs.append(config)
        self.jobs.append(
            Job(self.name, label, part.stage, stage.takes_all_nodes, nodes, tuple(overrides), directory, self.home)
        )

    def _finished(self, config: Config, part: Part) -> str:
        """Where a stage's result lies that is whole; empty where there is none, or where an earlier job may change what
        it was made from. Raises UserError where settings have changed without overwrite, or one of its gates fails."""
        stage = STAGES[part.stage]
        if not stage.kept:
            return ""
        with checked_for(self._nodes(part.stage)):
            artifacts.refuse_changed_settings(config, stage)
            if self.jobs or artifacts.examine(config, stage).state is not artifacts.State.finished:
                return ""
        gates.check(config, part.stage)  # a chain must not get past them by being submitted again
        return f"finished already in {artifacts.stage_directory(config, part.stage)}"

    def write(self) -> None:
        """Scripts and settings of the jobs, in place of those of an earlier chain."""
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        for old in (*self.home.glob("[0-9][0-9]-*.sh"), *self.home.glob("[0-9][0-9]-*.yaml")):
            old.unlink()
        for job, config in zip(self.jobs, self.configs, strict=True):
            artifacts.write_atomic(job.script, render(job, self.cluster, self.here))
            # The jobs do not get cluster.*, and so their own settings do not have it.
            stages = replace(self.cluster.stages, **{job.stage: job.nodes})
            settings = replace(config, cluster=replace(self.cluster, stages=stages))
            artifacts.write_atomic(job.settings, to_yaml(settings))

    def forget(self) -> None:
        """How the jobs of an earlier chain ended: their stops, verdicts and restarts do not count any more."""
        for old in (self.home / "state").glob("[0-9][0-9]-*"):
            old.unlink()

    def record(self, ids: Sequence[str]) -> None:
        """What was submitted, in chain.json."""
        jobs = [{"job": i, "part": job.label, "name": job.name} for i, job in zip(ids, self.jobs, strict=True)]
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        artifacts.write_json(self.home / "chain.json", {"submitted": when, "jobs": jobs})


def _hydra(path: str) -> str:
    """A path in Hydra's syntax."""
    return path if re.fullmatch(r"[A-Za-z0-9_./+-]+", path) else f"'{path}'"
