"""The report's one HTML page: no network, no script, everything from the run escaped. No torch."""

from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report import cells, efficiency, graph, search, sections, summary, training
from pipelines.report.record import MODELS, RunRecord
from pipelines.stages import STAGES

KEPT_INDICES_SHOWN = 6000  # characters; the whole stands in kept.json


def environment() -> Environment:
    return Environment(
        loader=PackageLoader("pipelines.report", "."),
        autoescape=lambda name: name is None or ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(record: RunRecord, results: dict[str, Any], configuration: str, plot_directory: Path) -> str:
    """The page as text; PNG files of its plots go to plot_directory, which exists.

    results: of `summary.results`; configuration: YAML.
    """
    models = results["models"]
    style = (Path(__file__).parent / "page.css").read_text()
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            style=Markup(style),
            run=record.name,
            results=results,
            written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            scale=_scale(models),
            pending=summary.pending_in_words(results["pending"]),
            highlights=_highlights(results),
            evaluated=evaluated_in_words(results),
            chain=_chain(record, results),
            absent_models=_absent_models(record, models),
            identity=record.manifests["distil"].get("figures", {}).get("loss", ""),
            planned=training.planned(record),
            distil_plots=training.distil_plots(record, plot_directory),
            teacher_plots=training.teacher_plots(record, plot_directory),
            importance_plots=training.importance_plots(record, plot_directory),
            searches=_searches(record, plot_directory),
            pruned_intro="Scores come from forward passes over calibration text." if record.importance else "",
            kept=_kept(results),
            times=_times(record, results),
            time_in_all=_time_in_all(results),
            graph=graph.draw(record),
            lineage=[_lineage_entry(entry) for entry in results["lineage"]],
            versions=_versions(results["lineage"]),
            licence=results.get("licence") or "not stated in the teacher's directory",
            configuration=configuration,
            **sections.evaluated(results, plot_directory),
            **sections.decided(record, results, plot_directory),
        )
    )


def _scale(models: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Where student and teacher stand on a line that begins at the pruned loss and ends at the lower of theirs.

    None where that says nothing. Places and margins in percent of the line.
    """
    if not all(summary.usable(models.get(role)) for role in MODELS):
        return None
    teacher, pruned, student = (models[role]["loss"] for role in MODELS)
    if pruned <= teacher:
        return None
    length = pruned - min(teacher, student)
    share, end = max((pruned - student) / length, 0.0), (pruned - teacher) / length
    # The label above the dot grows away from the nearer end.
    right = share > 0.5
    side = f"justify-content:{'flex-end' if right else 'flex-start'};margin-{'right' if right else 'left'}:"
    side += f"calc({100 * (1 - share if right else share):.2f}% - 7px)"
    labels = {role: f"{models[role]['loss']:.3f}" for role in MODELS}
    places = {"position": f"{share * 100:.2f}", "end": f"{end * 100:.2f}", "margin": f"{(1 - end) * 100:.2f}"}
    return places | {"side": side} | labels


def _highlights(results: dict[str, Any]) -> list[dict[str, str]]:
    student = results["models"].get("student", {})
    teacher = results["models"].get("teacher", {})
    items = []
    if results["parameters_kept"] is not None:
        items.append(("Parameters kept", f"{results['parameters_kept']:.1%}"))
    if results["pruning_gap_closed"] is not None:
        worse = results["pruning_gap_closed"] < 0
        title = "Pruning gap widened by" if worse else "Pruning gap closed"
        items.append((title, summary.percent(abs(results["pruning_gap_closed"]))))
    if results["student_minus_teacher"] is not None:
        difference = f"{results['student_minus_teacher']:+.3f} nats".replace("-", "\N{MINUS SIGN}")
        items.append(("Loss, student \N{MINUS SIGN} teacher", difference))
    if student.get("agreement") is not None:
        items.append(("Agreement, top-1", f"{student['agreement']:.1%}"))
    if (decode := efficiency.decode_ratio(results["efficiency"])) is not None:
        items.append(("Speed-up, decoding", f"{decode:.2f}×"))
    elif student.get("tokens_per_second") and teacher.get("tokens_per_second"):
        items.append(("Speed-up", f"{student['tokens_per_second'] / teacher['tokens_per_second']:.2f}×"))
    return [{"title": title, "value": value} for title, value in items]


def evaluated_in_words(results: dict[str, Any]) -> str:
    """On what the figures were measured."""
    if not results["models"]:
        return ""
    split, tokens, bytes_ = results["split"], results["tokens"], results["bytes"]
    text = f"On the {split} split: {tokens:,} tokens, {bytes_:,} bytes of text that no model was trained on."
    if results["unigram_entropy"]:
        text += f" The entropy of single tokens is {results['unigram_entropy']:.3f} nats/token."
    return text


def _absent_models(record: RunRecord, models: dict[str, Any]) -> list[str]:
    if "evaluate" in record.missing:
        return [record.missing["evaluate"]]
    reasons = record.evaluation.get("missing", {})
    return [f"{role}: {reasons.get(role, 'not evaluated.')}" for role in MODELS if role not in models]


def _chain(record: RunRecord, results: dict[str, Any]) -> dict[str, Any] | None:
    rows = [
        cells.row(words[0], [cells.cell(word) for word in words[1:]])
        for words in summary.chain_cells(results["steps"], record.directory)
    ]
    titles = [title for _, title, _ in summary.CHAIN]
    return cells.table("The steps of this run", titles[1:], rows, titles[0])


def _searches(record: RunRecord, directory: Path) -> list[dict[str, Any]]:
    """The run's own, or that of each step that had one."""
    if not record.steps:
        found = [_search("search", "The search for a shape", record.search, record.manifests["prune"], directory)]
    else:
        found = [
            _search(
                f"search-step{number}", f"The search of step {number}", step.search, step.manifests["prune"], directory
            )
            for number, step in enumerate(record.steps, start=1)
        ]
    return [one for one in found if one]


def _search(
    name: str, title: str, what: dict[str, Any], prune: dict[str, Any], directory: Path
) -> dict[str, Any] | None:
    """prune: the manifest of the stage that has searched."""
    found = search.section(what, prune.get("figures", {}).get("parameters_before"), directory, name)
    if found:
        head = [(column["title"], column["unit"]) for column in found["head"]]
        rows = [
            cells.row(row["name"], [cells.cell(text) for text in row["cells"]], ours=row["won"])
            for row in found["rows"]
        ]
        found["table"] = cells.table("Candidates of the search, the winner first", head, rows, "Candidate")
        found["plots"] = training.present(
            *(training.plot(entry["svg"], entry["title"], entry["caption"]) for entry in found["plots"])
        )
        found |= {"id": name, "title": title}
    return found


def _kept(results: dict[str, Any]) -> dict[str, str]:
    entry: dict[str, Any] = next((entry for entry in results["lineage"] if entry["stage"] == "prune"), {})
    return {
        axis: words if len(words) <= KEPT_INDICES_SHOWN else words[:KEPT_INDICES_SHOWN] + " … (all: prune/kept.json)"
        for axis, words in entry.get("kept", {}).items()
    }


def _times(record: RunRecord, results: dict[str, Any]) -> list[dict[str, Any]]:
    seconds = {name: stage["seconds"] for name, stage in results["stages"].items()}
    longest = max((value for value in seconds.values() if value), default=1.0)
    absent = {
        name: "given" if name in record.given else "unfinished" if record.manifests[name] else "not run"
        for name in seconds
    }
    return [
        {"name": name, "share": (value or 0) / longest, "text": absent[name] if value is None else duration(value)}
        for name, value in seconds.items()
    ]


def _time_in_all(results: dict[str, Any]) -> str:
    known = [stage["seconds"] for stage in results["stages"].values() if stage["seconds"]]
    return f"{duration(sum(known))} in all." if len(known) > 1 else ""


def duration(seconds: float) -> str:
    """12.3 -> "12.3 s"; 754 -> "12 min 34 s"; 7300 -> "2 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _lineage_entry(entry: dict[str, Any]) -> dict[str, Any]:
    facts = [
        _layout(entry.get("layout") or {}) if STAGES[entry["stage"].rpartition("/")[2]].ranks else "",
        f"seed {entry['seed']}" if entry.get("seed") is not None else "",
        f"commit {short_commit(entry['git'])}" if entry.get("git") else "",
        _moment(entry.get("finished") or ""),
    ]
    return {"stage": entry["stage"], "inputs": entry["inputs"], "facts": [fact for fact in facts if fact]}


def _layout(layout: dict[str, Any]) -> str:
    """ "2 processes on cpu: tensor 2"; degrees of 1 are left out."""
    if not layout.get("processes"):
        return ""
    degrees = [
        f"{name} {layout[name]}" for name in ("tensor", "pipeline", "context", "data") if layout.get(name, 1) > 1
    ]
    count = "1 process" if layout["processes"] == 1 else f"{layout['processes']} processes"
    return f"{count} on {layout.get('device', 'cpu')}" + (f": {', '.join(degrees)}" if degrees else "")


def _moment(text: str) -> str:
    """An ISO time to the minute; anything else as it is."""
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return text


def short_commit(commit: str) -> str:
    """The first 12 characters of a commit, with its "-dirty" where it has one."""
    identifier, _, rest = commit.partition("-")
    return identifier[:12] + (f"-{rest}" if rest else "")


def _versions(lineage: list[dict[str, Any]]) -> dict[str, str]:
    """Versions of the last stage that tells them; the stages of one run may differ, results.json has each."""
    return next((entry["versions"] for entry in reversed(lineage) if entry.get("versions")), {})
