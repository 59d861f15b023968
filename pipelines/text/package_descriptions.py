"""Prose that every machine has: how the installed Python packages describe themselves, mostly in English and Markdown.

Text of another kind than source code, without a network: what a model that was trained on code meets as foreign.
"""

from collections.abc import Iterator
from importlib import metadata

SHORTEST, LENGTH = 200, 1000  # characters of a description that is taken, and how much of its beginning


def documents() -> Iterator[str]:
    """The beginning of each package's description, cut at a line end, in the order of the packages' names."""
    found = {}
    for package in metadata.distributions():
        described = package.metadata
        text = (described.get("Description") or str(described.get_payload() or "")).strip()
        if described["Name"] and len(text) >= SHORTEST:
            found[str(described["Name"]).lower()] = text
    for name in sorted(found):
        yield _beginning(found[name])


def _beginning(text: str) -> str:
    if len(text) <= LENGTH:
        return text
    return text[: max(text.rfind("\n", 0, LENGTH), SHORTEST)]
