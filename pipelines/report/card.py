"""The model card: what the student is, its figures and where it comes from, in the form that Hugging Face reads."""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.report import summary
from pipelines.report.record import RunRecord

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def render(record: RunRecord, results: dict[str, Any], *, teacher: Path, student: Path, prompt: str) -> str:
    """The card as Markdown. teacher, student: Hugging Face directories, which may be missing."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", "."),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    before, after = _config(teacher), _config(student)
    sizes = [
        f"{key} {before[key]} to {after[key]}"
        for key in SIZES
        if before.get(key) != after.get(key) and before and after
    ]
    versions: dict[str, str] = next((e["versions"] for e in reversed(results["lineage"]) if e.get("versions")), {})
    entries = [{"git": None, "seed": None} | entry for entry in results["lineage"]]
    text = environment.get_template("card.md.jinja").render(
        run=record.name,
        results=results | {"lineage": entries},
        architecture=(after.get("architectures") or ["language model"])[0],
        table=summary.table(results["models"]) if results["models"] else [],
        evaluated=f"{results['split']} split, {results['tokens']:,} tokens" if results["models"] else "",
        teacher=teacher,
        licence=licence(teacher),
        layers=summary.ranges(record.kept["layers"]) if record.kept.get("layers") else "",
        sizes=", ".join(sizes),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        prompt=prompt,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def licence(directory: Path) -> str | None:
    """The licence that a directory states: `license:` in its card's header, else a licence file's first line."""
    card = directory / "README.md"
    if card.is_file():
        header = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        stated = header and re.search(r"^license(?:_name)?:\s*(\S.*)$", header[1], re.MULTILINE)
        if stated:
            return stated[1].strip().strip("\"'")
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        if (directory / name).is_file():
            lines = (directory / name).read_text(errors="replace").split("\n")
            return next((line.strip("# \t") for line in lines if line.strip()), name)
    return None


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
