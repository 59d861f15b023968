"""The model card: what the student is, its figures and where it comes from, in the form that Hugging Face reads."""

import html
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines import artifacts
from pipelines.config import Config, TeacherMode
from pipelines.report import cells, efficiency, summary, terms, variants
from pipelines.report.record import MODELS, RunRecord
from pipelines.report.terms import Terms, licence

__all__ = ["licence", "render", "terms_of"]

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def terms_of(config: Config) -> Terms:
    """Those of the model that the run was given, else of its teacher."""
    given = config.model.path if config.teacher.mode is not TeacherMode.pretrain else None
    own = Path(given) if given and Path(given).is_dir() else artifacts.teacher_directory(config)
    return terms.read(own, config.export.terms)


def render(
    record: RunRecord,
    results: dict[str, Any],
    *,
    teacher: Path,
    student: Path,
    prompt: str,
    under: Terms | None = None,
    form: dict[str, Any] | None = None,
) -> str:
    """The card as Markdown. teacher, student: Hugging Face directories, which may be missing. under: the terms; None:
    those that the teacher's directory states. form: the row of quantized.json that the card is of; None: the student
    itself."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", "."),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    under = under or terms.read(teacher)
    before, after = _config(teacher), _config(student)
    sizes = [
        f"{key} {before[key]} to {after[key]}"
        for key in SIZES
        if before.get(key) != after.get(key) and before and after
    ]
    versions: dict[str, str] = next((e["versions"] for e in reversed(results["lineage"]) if e.get("versions")), {})
    entries = [{"git": None, "seed": None} | entry for entry in results["lineage"]]
    text = environment.get_template("card.md.jinja").render(
        name=plain(under.name(record.name)),
        results=results | {"lineage": entries},
        architecture=(after.get("architectures") or ["language model"])[0],
        table=_figures(results["models"]) if results["models"] else [],
        evaluated=f"{results['split']} split, {results['tokens']:,} tokens" if results["models"] else "",
        tasks=_tasks(results["tasks"]),
        speeds=_speeds(results["efficiency"]),
        forms=_forms(results["quantized"]),
        forms_on=_forms_on(results),
        form=form,
        teacher=plain(_name_of(record, teacher)),
        header=terms.header(under),
        licence=plain(under.licence or ""),
        asks=under.asks(),
        built_with=f"Built with {'Meta ' if under.llama == '3' else ''}Llama" if under.prefix else "",
        made=_made(record),
        layers=summary.ranges(record.kept["layers"]) if record.kept.get("layers") else "",
        sizes=", ".join(sizes),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        prompt=prompt,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def plain(text: str) -> str:
    """Words from elsewhere as text on one line of Markdown: neither HTML nor links, images, code or cells of tables."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escaped)


def _name_of(record: RunRecord, directory: Path) -> str:
    """The teacher by a name, not by a place on the machine that made the card: that of the model that was given, of a
    hub's cache as the hub has it; of one that was trained here its run's."""
    given = (record.manifests["teacher"].get("inputs") or {}).get("model", {}).get("path")
    if not given and directory.parent.name == "teacher":
        return f"trained in the run {record.name}"
    path = Path(given or directory)
    cached = next((part for part in path.parts if part.startswith("models--")), "")
    return cached.removeprefix("models--").replace("--", "/") if cached else path.name


def _figures(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The page's table, with the interval behind each figure that has one."""
    forms = {key: form for key, _, _, form in summary.FIGURES}
    rows = []
    for row in summary.table(models):
        shown = []
        for role, text in zip(MODELS, row["cells"], strict=True):
            interval = (models.get(role, {}).get("intervals") or {}).get(row["key"])
            words = cells.between(interval, forms[row["key"]]) if text != cells.NONE else ""
            shown.append(f"{text} ({words})" if words else text)
        rows.append(row | {"cells": shown})
    return rows


def _tasks(found: dict[str, Any]) -> list[list[str]]:
    """A row per task: its name with metric and shots, and each model's value with its standard error."""
    models = found.get("models") or {}
    rows = []
    for task in dict.fromkeys(task for each in models.values() for task in each):
        known = [models.get(role, {}).get(task) for role in MODELS]
        first = next(entry for entry in known if entry)
        rows.append([f"{task}, {first['metric']}, {first['shots']} shots"] + [_score(entry) for entry in known])
    return rows


def _score(entry: dict[str, Any] | None) -> str:
    if not entry or not cells.is_number(entry.get("value")):
        return cells.NONE
    error = entry.get("stderr")
    return f"{entry['value']:.4f}" + (f" ± {error:.4f}" if cells.is_number(error) else "")


def _speeds(found: dict[str, Any]) -> dict[str, Any] | None:
    """The student's rows of efficiency, and what they were measured on."""
    rows = [row for row in found.get("rows") or [] if row["model"] == "student"]
    if not rows:
        return None
    where = [found["device"], f"{found['threads']} threads" if found.get("threads") else "", found["dtype"]]
    shown = [
        [
            efficiency.setting(row),
            *(
                f"{row[key]:,.1f}" + (f" ({row['ratio'][key]:.2f}×)" if row.get("ratio") else "")
                for key in ("time_to_first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second")
            ),
        ]
        for row in rows
    ]
    return {"rows": shown, "where": ", ".join([*filter(None, where), found["form"]])}


def _forms(found: dict[str, Any]) -> list[list[str]]:
    """Rows of quantized variants and of what they were made of."""
    rows = []
    for name, entry in [*(found.get("before") or {}).items()] + [(row["name"], row) for row in _kept(found)]:
        noise = cells.find(entry.get("differences"), figure="loss")
        mark = f", {cells.noise(noise)}" if noise else ""
        kl = "{:.4f}".format(entry["kl"]) if cells.is_number(entry.get("kl")) else cells.NONE
        rows.append([name, f"{entry['bytes']:,}", f"{entry['loss']:.4f}{mark}", kl])
    return rows


def _forms_on(results: dict[str, Any]) -> str:
    """On what the forms were scored, where that is not what the models above were."""
    found = results["quantized"]
    return f", {found['split']} split, {found['tokens']:,} tokens" if variants.other_windows(results) else ""


def _kept(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in found.get("variants") or [] if "refused" not in row]


def _made(record: RunRecord) -> list[str]:
    """How the student came to be, a line for each stage that tells."""
    figures = {stage: record.manifests[stage].get("figures", {}) for stage in ("teacher", "prune", "distil")}
    lines = []
    if figures["teacher"].get("tokens"):
        lines.append(f"The teacher was trained here on {figures['teacher']['tokens']:,} tokens.")
    if figures["prune"].get("parameters_after"):
        prune = figures["prune"]
        lines.append(f"Pruned from {prune['parameters_before']:,} to {prune['parameters_after']:,} parameters.")
    if figures["distil"].get("tokens"):
        distil = figures["distil"]
        lines.append(f"Trained on {distil['tokens']:,} tokens in {distil['steps']:,} steps; {distil['loss']}.")
        lines.append("The loss's temperature T is of training alone: generation_config.json is the teacher's.")
    return lines


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
