"""What is to be fetched, what is to be tried on a machine, and that no setting holds a secret."""

import os
import re
from collections.abc import Collection

from pipelines import secrets
from pipelines.config import Config, expect
from pipelines.site_settings import AcceptPart

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
    inside = os.environ.get("WORLD_SIZE", "1") == "1"
    remedy = (
        "Start it without torchrun: it starts what it needs on this machine. Several machines are tried by "
        "launchers/slurm.sh stage=accept, or by torchrun -m pipelines.model.machines on each (docs/site.md)."
    )
    expect(inside, "stage=accept", "one process", f"WORLD_SIZE={os.environ.get('WORLD_SIZE')}", remedy)


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
