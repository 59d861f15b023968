"""What is to be fetched, what is to be tried on a machine, and that no setting holds a secret."""

import os
import re
from collections.abc import Collection
from dataclasses import replace

from pipelines import planning, secrets
from pipelines.config import Config, Precision, expect, layout, searches
from pipelines.site_settings import AcceptPart

CPU_FLOPS = 1e15  # of all steps of an acceptance: three hours at 100 GFLOP/s
NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def check_secrets(config: Config) -> None:
    """Raises UserError for a setting that holds a token, without repeating it."""
    for setting, text in secrets.texts(config):
        found = secrets.found_in(text)
        remedy = (
            "Settings are written into manifests and logs: leave it in the environment, or in the service's own file."
        )
        expect(not found, setting, "no token or password", found, remedy)


def check_acceptance(config: Config, stages: Collection[str]) -> None:
    if "accept" not in stages:
        return
    names = ", ".join(part.value for part in AcceptPart)
    expect(bool(config.accept.parts), "accept.parts", f"some of {names}", "none", "Leave it out for all.")
    expect(bool(config.accept.bandwidth_bytes), "accept.bandwidth_bytes", "some sizes", "none", "Give one or more.")
    _check_steps(config)
    inside = os.environ.get("WORLD_SIZE", "1") == "1"
    remedy = (
        "Start it without torchrun: it starts what it needs on this machine. Several machines are tried by "
        "launchers/slurm.sh stage=accept, or by torchrun -m pipelines.model.machines on each (docs/site.md)."
    )
    expect(inside, "stage=accept", "one process", f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}", remedy)


def _check_steps(config: Config) -> None:
    """Whole steps of large models take a CPU hours, or more memory than there is."""
    settings, ranks = config.accept, layout(config.parallel)
    if AcceptPart.steps not in settings.parts or ranks.device == "cuda" or searches(config):
        return
    training = replace(
        config.distil,
        sequence_length=settings.sequence_length,
        micro_batch_size=1,
        global_batch_size=1,
        precision=Precision.fp32,
        teacher_precision=None,
    )
    teacher, student = planning.teacher_shape(config), planning.student_shape(config)
    flops = planning.step_flops(training, teacher, student).total * settings.sequence_length * (settings.steps + 2)
    held = planning.step_bytes(training, teacher, student, ranks)["total"] * ranks.processes
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expect(
        flops <= CPU_FLOPS and held <= memory,
        "accept.parts",
        f"steps that a CPU can take: at most {CPU_FLOPS:.0e} FLOPs, and {memory / 1e9:,.0f} GB of memory here",
        f"{flops:.1e} FLOPs and {held / 1e9:,.0f} GB for {settings.steps + 2} steps of {teacher.parameters():,} and "
        f"{student.parameters():,} parameters",
        "Start it on GPUs, leave experiment= out for small models, lower accept.steps and accept.sequence_length, or "
        "leave steps out of accept.parts.",
    )


def check(config: Config, stages: Collection[str]) -> None:
    if "fetch" not in stages:
        return
    settings = config.fetch
    expect(
        bool(settings.models or settings.datasets or settings.tasks),
        "fetch.models",
        "what to fetch, as in fetch.models=[meta-llama/Llama-3.1-8B], fetch.datasets or fetch.tasks",
        "none",
        "Name some.",
    )
    for kind in ("models", "datasets"):
        seen = set()
        for place, name in enumerate(getattr(settings, kind)):
            setting = f"fetch.{kind}[{place}]"
            known = bool(NAME.fullmatch(name)) and ".." not in name
            expect(known, setting, "owner/name or owner/name@revision", repr(name), "Write it as the hub does.")
            repository = name.partition("@")[0]
            expect(repository not in seen, setting, "each name once", f"{repository} again", "Leave one out.")
            seen.add(repository)
    expect(
        bool(settings.files) or not settings.datasets, "fetch.files", "patterns", "none", "Give ['*'] for all files."
    )
