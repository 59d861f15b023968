"""The files that prompts come from. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import UserError


@dataclass(frozen=True)
class Prompt:
    """category: "" where the file has none."""

    text: str
    category: str = ""


def read_prompts(path: Path, setting: str, *, categories: bool) -> list[Prompt]:
    """Of a JSONL file with "prompt", and with "category" where they are asked for, in every line. Raises UserError."""
    names = ("category", "prompt") if categories else ("prompt",)
    found = []
    for number, line in enumerate(read_text(path, setting).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: expected JSON, found an error: {error}. Correct it.") from None
        texts = [row.get(name) if isinstance(row, dict) else None for name in names]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(
                f"{path}, line {number}: expected texts as {' and '.join(names)}, found {line.strip()[:80]}. Correct "
                "the line or remove it."
            )
        found.append(Prompt(row["prompt"], row["category"] if categories else ""))
    if not found:
        raise UserError(f"{path}: expected a prompt per line, found none. Give another file with {setting}.")
    return found


def read_text(path: Path, setting: str) -> str:
    """UTF-8. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{setting}={path}: expected a file, found nothing. Check the path.") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{setting}={path}: expected a text file in UTF-8, found something else.") from None
