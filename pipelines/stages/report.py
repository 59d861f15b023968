"""The report: one HTML page, results.json, plots and a model card, from what the other stages left on disk.

A part that a run does not have is shown as missing with its reason; where nothing has finished there is no report.
Needs no ranks and no torch.
"""

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table

from pipelines import artifacts, console, files
from pipelines.config import Config, UserError
from pipelines.report import card, compare, page, runs, summary
from pipelines.report.record import MODELS, read_run


def run(context: artifacts.StageContext) -> dict[str, Any]:
    """Write <directory>/{index.html,results.json,MODEL_CARD.md,plots/*.png} and print the closing table."""
    config, directory = context.config, context.directory
    if config.report.runs:
        return compared(context)
    record = read_run(config)
    if not any(record.complete.values()) and not record.teacher_metrics.rows and not record.distil_metrics.rows:
        raise UserError(
            f"report: expected at least one finished stage in {record.directory}, found none. Run stage=all, or name "
            "the run with run.name and run.directory."
        )
    results = summary.results(record)
    teacher, student = artifacts.teacher_directory(config), artifacts.student_directory(config)
    under = card.terms_of(config)
    results["licence"] = under.licence
    with files.new_directory(directory / "plots") as plots:
        html = page.render(record, results, configuration_text(config), plots)
    model_card = card.render(
        record, results, teacher=teacher, student=student, prompt=config.export.prompt, under=under
    )
    files.write_json(directory / "results.json", results)
    files.write_atomic(directory / "MODEL_CARD.md", model_card)
    files.write_atomic(directory / "index.html", html)
    print_closing(results, directory / "index.html", artifacts.stage_directory(config, "export") / "hf")
    figures = ("parameters_kept", "pruning_gap_closed", "student_minus_teacher")
    return {"verdict": results["verdict"]} | {name: results[name] for name in figures}


def compared(context: artifacts.StageContext) -> dict[str, Any]:
    """Several runs on one page: <directory>/{index.html,results.json,plots/*.png}."""
    directory, records = context.directory, runs.read(context.config)
    results = compare.results(records)
    with files.new_directory(directory / "plots") as plots:
        html = compare.render(records, results, plots)
    files.write_json(directory / "results.json", results)
    files.write_atomic(directory / "index.html", html)
    console.say(compare.verdict(results))
    console.say(results["decision"]["why"])
    console.say(f"report          {directory / 'index.html'}")
    return {"recommended": results["decision"]["recommended"]}


def configuration_text(config: Config) -> str:
    """The resolved configuration as YAML."""
    tree = json.loads(
        json.dumps(asdict(config), default=lambda value: value.value if isinstance(value, Enum) else str(value))
    )
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def print_closing(results: dict[str, Any], page_path: Path, export_path: Path) -> None:
    """The table of the evaluated models, what is still missing, and where the page and the model lie."""
    if results["models"]:
        _print_table(results)
    console.say(results["verdict"])
    if results["pending"]:
        console.say(summary.pending_in_words(results["pending"]))
    console.say(f"report          {page_path}")
    if (export_path / "config.json").is_file():
        console.say(f"exported model  {export_path}")


def _print_table(results: dict[str, Any]) -> None:
    wide = ("perplexity", "overlap", "calibration_error")  # on the page alone
    rows = [row for row in summary.table(results["models"]) if row["key"] not in wide]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(row["title"] + (f"\n{row['unit']}" if row["unit"] else ""), justify="right")
    for number, role in enumerate(MODELS):
        if role in results["models"]:
            table.add_row(role, *(row["cells"][number] for row in rows))
    console.terminal().print(table)
