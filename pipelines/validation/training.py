"""Settings of a training run against each other."""

import importlib.util
import os
from collections.abc import Collection, Iterator

from pipelines import elsewhere
from pipelines.config import (
    Config,
    DistilConfig,
    Divergence,
    Layout,
    Optimizer,
    RunConfig,
    TeacherMode,
    Tracker,
    TrainingConfig,
    VerifyConfig,
    expect,
)


def check(config: Config, stages: Collection[str], ranks: Layout, vocab_size: int) -> None:
    """vocab_size: of teacher and student."""
    for name, training in trainings(config, stages):
        _check_run(name, training, ranks)
        _check_trackers(config.run)
    if "plan" in stages:
        _check_batch("distil", config.distil, ranks)
    for name, loss in (("distil", config.distil), ("verify", config.verify)):
        weighted = name not in stages or loss.kd_weight > 0 or loss.ce_weight > 0
        expect(weighted, name, "kd_weight or ce_weight above 0", "both 0", "Set one of them.")
        if name in stages:
            _check_divergence(name, loss)
    if {"plan", "distil"} & set(stages) and config.distil.gradient_filter:
        bounded = config.distil.divergence is not Divergence.reverse_kl and not config.distil.top_k
        unbounded = f"distil.divergence={config.distil.divergence.value}, distil.top_k={config.distil.top_k}"
        needed = "a divergence whose slope is bounded, which reverse_kl and top_k are not"
        expect(bounded, "distil.gradient_filter", needed, unbounded, "Leave one of them out.")
    if "distil" in stages and config.distil.top_k:
        below = f"fewer than the vocabulary's {vocab_size} ids"
        expect(
            config.distil.top_k < vocab_size, "distil.top_k", below, config.distil.top_k, "Lower it, or leave it out."
        )


WITH_PARAMETER = (Divergence.jensen_shannon, Divergence.skew_kl)


def _check_divergence(name: str, loss: DistilConfig | VerifyConfig) -> None:
    parameter, setting = loss.divergence_parameter, f"{name}.divergence_parameter"
    if parameter is None:
        return
    which = f"with {name}.divergence={loss.divergence.value}"
    expect(loss.divergence in WITH_PARAMETER, setting, f"none {which}", parameter, "Leave it out.")


def trainings(config: Config, stages: Collection[str]) -> Iterator[tuple[str, TrainingConfig]]:
    """(stage, settings) of the stages that are asked for and train."""
    if "teacher" in stages and config.teacher.mode is not TeacherMode.take:
        yield "teacher", config.teacher
    if "distil" in stages:
        yield "distil", config.distil


def _check_trackers(run: RunConfig) -> None:
    named = bool(run.project.strip()) or not run.trackers
    expect(named, "run.project", "a name", "nothing", "Leave it out.")
    for tracker in run.trackers:
        packages = [tracker.value]
        if tracker is Tracker.mlflow and not os.environ.get("MLFLOW_TRACKING_URI"):
            packages += ["sqlalchemy", "alembic"]  # of its database in a file
        for package in packages:
            found = importlib.util.find_spec(package)
            installed = elsewhere.in_image() or (
                found is not None and found.origin is not None
            )  # else a directory of that name
            remedy = "pip install 'stillhouse[trackers]', or leave the tracker out."
            expect(installed, f"run.trackers={tracker.value}", f"the package {package}", "none installed", remedy)


def _check_batch(name: str, training: TrainingConfig, ranks: Layout) -> None:
    unit = training.micro_batch_size * ranks.data
    expect(
        training.global_batch_size % unit == 0,
        f"{name}.global_batch_size",
        f"a multiple of {unit}, {name}.micro_batch_size * {ranks.data} data-parallel ranks",
        training.global_batch_size,
        f"Take {max(1, training.global_batch_size // unit) * unit}, or change the micro batch.",
    )


def _check_run(name: str, training: TrainingConfig, ranks: Layout) -> None:
    _check_batch(name, training, ranks)
    expect(
        training.warmup_steps < training.steps,
        f"{name}.warmup_steps",
        f"fewer than {name}.steps={training.steps}",
        training.warmup_steps,
        "Lower it.",
    )
    _check_optimizer(f"{name}.optimizer", training.optimizer, ranks)
    expect(
        training.min_learning_rate <= training.learning_rate,
        f"{name}.min_learning_rate",
        f"at most {name}.learning_rate={training.learning_rate:g}",
        training.min_learning_rate,
        "Lower it.",
    )


# What tells each by its installation; "apex" alone is also the name of another project.
OPTIMIZERS = {Optimizer.transformer_engine: ("transformer_engine",), Optimizer.apex: ("apex", "amp_C")}


def _check_optimizer(setting: str, optimizer: Optimizer, ranks: Layout) -> None:
    if optimizer not in OPTIMIZERS:
        return
    remedy = f"Use {setting}=auto."
    expect(ranks.device == "cuda", setting, "auto or torch on the CPU", optimizer.value, remedy)
    missing = [module for module in OPTIMIZERS[optimizer] if not elsewhere.installed(module)]
    expected = "an optimizer that is installed"
    expect(not missing, setting, expected, f"{optimizer.value} without {', '.join(missing)}", remedy)
