"""What made a result: code, versions, layout, machine, command; and what differs from it now. Imports no torch."""

import json
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
from pipelines.files import file_hash

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


def changes(manifest: dict[str, Any], now_settings: dict[str, Any], now_inputs: dict[str, Any]) -> list[str]:
    """What differs between a manifest and now, one line each: `distil.steps: 200 -> 300`.

    A setting that the manifest does not know and that is off is no difference: the version that wrote it had none.
    """
    lines = []
    before = manifest.get("settings", {})
    off = {key: value for key, value in now_settings.items() if value is None or value is False or value == []}
    before = {key: value for key, value in off.items() if key not in before} | before
    for key in sorted(before.keys() | now_settings.keys()):
        if key not in before or key not in now_settings or before[key] != now_settings[key]:
            old, new = (json.dumps(side[key]) if key in side else "(not there)" for side in (before, now_settings))
            lines.append(f"{key}: {old} -> {new}")
    known = manifest.get("inputs", {})
    for name in sorted(known.keys() | now_inputs.keys()):
        old_files, new_files = (side.get(name, {}).get("files", {}) for side in (known, now_inputs))
        different = [f for f in sorted(old_files.keys() | new_files.keys()) if old_files.get(f) != new_files.get(f)]
        if different:
            file = different[0]
            old, new = (files.get(file, "(not there)")[:12] for files in (old_files, new_files))
            more = f" and {len(different) - 1} more files" if len(different) > 1 else ""
            where = (now_inputs.get(name) or known[name])["path"]
            lines.append(f"input {name} ({where}): {file} {old} -> {new}{more}")
    return lines


def alterations(manifest: dict[str, Any], directory: Path, sidecars: Path) -> dict[str, str]:
    """Which of a finished stage's files hold something else now, by name, and a line of each: `hf/config.json: 1f0c ->
    93ab`.

    What was removed, to save room, is no alteration: a stage that needs it says so. Nor is a text for people, such as
    the model card.
    """
    lines = {}
    for name, before in manifest.get("outputs", {}).items():
        path = directory / name
        if path.suffix != ".md" and path.is_file() and (now := file_hash(path, sidecars)) != before:
            lines[name] = f"{name}: {before[:12]} -> {now[:12]}"
    return lines
