"""Which variant to take: teacher, pruned, distilled and quantized forms of a run, or of several runs of one teacher,
by size, quality and speed, within the limits of decide.*. Reads what other stages left and writes nothing. No torch.
"""

import json
from typing import Any

from rich import box
from rich.table import Table

from pipelines import artifacts, console
from pipelines.config import Config, Format, UserError
from pipelines.report import decide, runs, summary, variants
from pipelines.report.record import RunRecord, read_run


def run(context: artifacts.StageContext) -> dict[str, Any]:
    """Print the variants and the one recommended; as JSON with format=json. Raises UserError where none is."""
    config = context.config
    decision = decided(config)
    found = decide.in_results(decision)
    if config.format is Format.json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(decision)
    if decision.recommended is None:
        raise UserError(f"decide: {decision.why}")
    if config.format is not Format.json:
        console.say(decision.why)
    return found


def decided(config: Config) -> decide.Decision:
    """Raises UserError where nothing was evaluated, or the runs cannot be compared."""
    records = runs.read(config) if config.report.runs else [_own(config)]
    if len(records) > 1:
        runs.refuse_other_teachers(records)
    rows, differences = [], {}
    for record in records:
        results = summary.results(record)
        rows += variants.rows(record, results)
        differences[record.name] = variants.differences(results)
    limits = decide.Limits(config.decide.bytes, config.decide.loss_below, config.decide.tokens_per_second)
    return decide.decide(rows, limits, differences)


def _own(config: Config) -> RunRecord:
    record = read_run(config)
    if not record.evaluation.get("models"):
        raise UserError(
            f"decide: expected evaluated models, found no evaluate/results.json in {record.directory}. Run "
            "stage=evaluate first, or name runs by report.runs=[a,b]."
        )
    return record


def _print_table(decision: decide.Decision) -> None:
    found = decide.table(decision)
    if found is None:
        return
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in found["head"]:
        table.add_column(column["title"] + (f"\n{column['unit']}" if column["unit"] else ""), justify="right")
    for row in found["rows"]:
        texts = [cell["text"] + (f"\n{cell['note']}" if cell["note"] else "") for cell in row["cells"]]
        table.add_row(row["title"] + (f"\n{row['note']}" if row["note"] else ""), *texts)
    console.terminal().print(table)
