"""What must not be written down: tokens and passwords, told by their looks or as the environment's own. No torch.

Settings go into manifests, logs, the report and trackers. So none of them may hold a secret.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

# Prefixes by which the usual services' tokens are known, and a password in an address.
LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{18,}"
    r"|\bnvapi-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abp]-[\w-]{10,}|\w+://[^/\s:@]+:[^/\s@]+@"
)
NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIALS?)(_|$)")
SHORTEST = 8  # characters of a value of the environment that counts as a secret: "1" and "true" do not


def of_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """{name: value} of the variables whose names say that they are secret. A path, as HF_TOKEN_PATH has, is none."""
    return {
        name: value.strip()
        for name, value in environment.items()
        if NAMES.search(name.upper()) and len(value.strip()) >= SHORTEST and not os.path.exists(value.strip())
    }


def named_secret(variable: str, value: str = "") -> bool:
    """Whether a variable's name says that its value is secret. HF_TOKEN_PATH and the like name a place, and so does
    GOOGLE_APPLICATION_CREDENTIALS where its value is an absolute path."""
    name = variable.upper()
    place = name.endswith("CREDENTIALS") and bool(re.fullmatch(r"(/[\w.@+-]+)+", value))
    return bool(NAMES.search(name)) and not place and not name.endswith(("_PATH", "_FILE", "_DIR"))


def found_in(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """What in a text looks like a secret, in words that do not repeat it; empty where nothing does."""
    for name, value in of_environment(environment).items():
        if value in text:
            return f"the value of {name}"
    if match := LOOKS.search(text):
        return f"what looks like a token ({match[0][:3]}...)"
    return ""


def texts(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every text in the settings, in lists and mappings too."""
    if is_dataclass(settings):
        settings = vars(settings)
    if isinstance(settings, str):
        yield path, settings
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from texts(value, f"{path}.{name}" if path else str(name))
    elif isinstance(settings, list):
        for place, value in enumerate(settings):
            yield from texts(value, f"{path}[{place}]")
