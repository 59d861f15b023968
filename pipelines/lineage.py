"""What made a result: code, versions, layout, machine, command. Imports no torch."""

import os
import platform
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines import config as configuration

PACKAGES = (
    "stillhouse",
    "torch",
    "nemo-toolkit",
    "megatron-core",
    "nvidia-modelopt",
    "transformer-engine",
    "lightning",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)


def describe(config: configuration.Config) -> dict[str, Any]:
    return {
        "git": git_commit(),
        "versions": {"python": platform.python_version()} | versions(),
        "layout": asdict(configuration.layout(config.parallel)),
        "seed": config.run.seed,
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` behind it where files differ; in an image the one it was built from; None
    where neither is known."""
    root = Path(__file__).resolve().parent.parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            check=False,
            cwd=root,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        found = result.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    built = os.environ.get("STILLHOUSE_COMMIT", "unknown")  # Dockerfile
    return found or (built if built != "unknown" else None)


def to_yaml(tree: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(tree, sort_keys=False))
