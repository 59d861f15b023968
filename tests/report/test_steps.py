"""The table of a run in steps: what each was made from and came to, and what has not come so far."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipelines.config import Config
from pipelines.prune_settings import StepConfig
from pipelines.report import page, summary
from pipelines.report.record import read_importance, read_run


def manifest(directory: Path, figures: dict[str, Any], teacher: str) -> None:
    directory.mkdir(parents=True)
    files = {"model.safetensors": "ab" * 32}
    content = {"figures": figures, "inputs": {"teacher": {"path": teacher, "files": files}}, "seed": 1}
    (directory / "manifest.json").write_text(json.dumps(content))


def test_a_row_per_step_whether_it_is_there_yet_or_not_and_a_parent_for_each(tmp_path: Path) -> None:
    config = Config()
    config.run.directory, config.run.name = str(tmp_path), "run"
    config.iterate.students = [StepConfig(hidden_size=size) for size in (8, 6, 4)]
    run = tmp_path / "run"
    for place, parameters, start in (
        (run / "step1", 800, "teacher"),
        (run / "step2", 600, str(run / "step1" / "distil" / "hf")),
    ):
        manifest(place / "prune", {"parameters_after": parameters, "ratio": 0.75}, start)
    manifest(run / "step1" / "distil", {"steps": 5, "tokens": 1000, "validation": {"ce": 3.5, "kd": 0.25}}, "teacher")
    rows = [{"step": 1, "split": "train", "ce": 4.25}, {"step": 5, "split": "validation", "ce": 3.5}]
    (run / "step1" / "distil" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    record = read_run(config)
    first, second, third = rows = summary.chain(record)
    assert (first["start"], first["teacher"], second["start"], second["teacher"]) == (
        "teacher",
        "teacher",
        str(run / "step1" / "distil" / "hf"),
        None,
    )
    assert summary.chain_cells(rows, run)[0] == [
        "1",
        "teacher",
        "teacher",
        "800",
        "75.0%",
        "1,000",
        "4.2500",
        "3.5000",
        "0.2500",
    ]
    assert summary.chain_cells(rows, run)[1] == ["2", "step1/distil/hf", "–", "600", "75.0%", "–", "–", "–", "–"]
    assert summary.chain_cells([third], run) == [["3", *"––––––––"]]
    parents = {entry["stage"]: entry["inputs"]["teacher"]["sha256"] for entry in summary.lineage(record)}
    assert parents == dict.fromkeys(("step1/prune", "step1/distil", "step2/prune"), "ab" * 32)
    far = first | {"start": "/scratch/models/meta-llama/Llama-3.1-8B"}
    assert summary.chain_cells([far], run)[0][1] == "…/meta-llama/Llama-3.1-8B"
    assert summary.chain(read_run(Config())) == []


def test_the_search_of_every_step_is_on_the_page_under_its_own_name(tmp_path: Path) -> None:
    config = Config()
    config.run.directory, config.run.name = str(tmp_path), "run"
    config.iterate.students = [StepConfig(ratio=ratio) for ratio in (0.8, 0.6)]
    for number, place in ((1, tmp_path / "run" / "step1"), (2, tmp_path / "run")):
        manifest(place / "prune", {"parameters_before": 1000, "parameters_after": 1000 - 200 * number}, "teacher")
        shape = {
            "parameters": 1000 - 200 * number,
            "predicted": 4.0,
            "measured": 3.5 + number,
            "tokens_per_second": 9.0,
        }
        found = {"measured": [f"h{number}"], "winner": f"h{number}", "candidates": {f"h{number}": shape}, "within": 1}
        (place / "prune" / "search.json").write_text(json.dumps(found | {"source": {"path": "elsewhere"}}))
    record = read_run(config)
    results = summary.results(record)
    assert [row["search"]["winner"] for row in results["steps"]] == ["h1", "h2"] and "elsewhere" not in str(results)
    (tmp_path / "plots").mkdir()
    text = page.render(record, results, "", tmp_path / "plots")
    for number in (1, 2):
        part = re.search(rf'<section id="search-step{number}".*?</section>', text, re.S)
        assert part and f"The search of step {number}" in part[0]
        assert f">h{number}<" in part[0] and f"{3.5 + number:.4f}" in part[0] and f">h{3 - number}<" not in part[0]
    drawn = {path.name for path in (tmp_path / "plots").glob("search*")}
    assert {name.partition("_")[0] for name in drawn} == {"search-step1", "search-step2"}


def test_kv_groups_are_shown_where_some_went_and_in_words(tmp_path: Path) -> None:
    names = ("ffn", "heads", "kv_groups")
    scores = {f"{name}.{layer}": np.arange(4.0) for name in names for layer in (1, 2)}
    save_file({**scores, "hidden": np.arange(3.0), "block_influence": np.ones(2)}, tmp_path / "scores.safetensors")
    kept = {"hidden": [0, 1, 2], "layers": [1, 2], **{name: {"1": [0, 1], "2": [1, 3]} for name in ("ffn", "heads")}}
    gone = kept | {"groups": {"1": [0, 1], "2": [1, 3]}}
    axes = {axis.name: axis for axis in read_importance(tmp_path / "scores.safetensors", gone)}
    assert [list(np.flatnonzero(mask)) for mask in axes["kv_groups"].kept] == [[0, 1], [1, 3]]
    everything = kept | {"groups": {"1": [0, 1, 2, 3], "2": [0, 1, 2, 3]}}
    assert "kv_groups" not in [axis.name for axis in read_importance(tmp_path / "scores.safetensors", everything)]
    assert summary.kept_in_words(gone)["KV groups of layer 2"] == "1, 3"
