"""The page of a run with everything that an evaluation may measure, and of runs in which parts of it are missing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Config
from pipelines.report import cells, charts, graph, judgement, page, quality, sections, tasks
from pipelines.report.record import read_run
from tests.report.pages import Page, make
from tests.stages import sample_evaluation
from tests.stages.sample_run import sample_search, write_sample_run

Made = tuple[Page, dict[str, Any], Path]


def write_whole_run(root: Path) -> Path:
    run = write_sample_run(root)
    path = run / "evaluate" / "results.json"
    path.write_text(json.dumps(sample_evaluation.whole(json.loads(path.read_text()))))
    (run / "export" / "quantized.json").write_text(json.dumps(sample_evaluation.quantized()))
    (run / "prune" / "search.json").write_text(json.dumps(sample_search()))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("whole")
    write_whole_run(root / "quickstart")
    return make(root)


def words(document: Page) -> str:
    return re.sub(r"\s+", " ", document.text)


def test_the_verdict_names_the_gate_that_failed_and_what_to_take(whole: Made) -> None:
    text = words(whole[0])
    above = text.partition("Parameters kept")[0]
    assert "1 of 2 gates passed. Failed: student.kl is 0.041, expected below 0.03." in above
    assert (
        "Take the quantized int8: of the variants it is the smallest whose loss, 2.9340 nats/token, is within noise of"
        in above
    )
    assert "It has 18% of the teacher's bytes" in above and "No vllm: not installed here." in text
    assert whole[1]["decision"]["recommended"] == {"run": "quickstart", "name": "int8"}


@pytest.mark.parametrize(
    "shown",
    [
        "Against the stored baseline",
        "2.8900 to 2.9800",  # an interval
        "+0.0300 −0.0020 to +0.0610 within noise",
        "+0.0130 +0.0040 to +0.0210 larger than noise",
        "word inside 21.0%",
        "from 4",  # of the teacher's entropy
        "Reliability.",
        "Loss by position.",
        "contracts own text, 31 documents, 12,000 tokens",
        "Measured by lm-evaluation-harness 0.4.9.1.",
        "No score in gsm8k: its data is not here.",
        "mmlu acc, 5 shots, 400 samples",
        "0.653 0.605",  # published
        "−0.020 −0.050 to +0.010 within noise",
        "512 30,000 tokens of text 2.8488",
        "Loss by position in the longest sequences.",
        "student harmful How do I? I cannot. refused",
        "No behaviour of pruned: it is not here.",
        "2 more prompts",
        "the the the <b>of</b> of of",
        "Template rate 10.0% 10.0% 10.0%",
        "harmful 25 prompts 4.0% 0.0% to 12.0%",
        "Measured on cpu, 2 threads, fp32, transformers 4.53.3.",
        "batch 8, 64 + 32 tokens 98.8 0.59× 5,100 1.70×",
        "13.2 MB 0.57×",
        "Speed-up, decoding 1.70×",
        "int4 compressed-tensors 0.9 student 2.6 MB 3.2100",
        "+0.2800 +0.2700 to +0.2900 larger than noise",
        "expected inputs that 32 divides, found 20.",  # why a form was refused
        "Hollow marks were measured on other text",
    ],
)
def test_what_was_measured_is_on_the_page(whole: Made, shown: str) -> None:
    assert shown in words(whole[0])


def test_the_parts_are_in_results_json_too(whole: Made) -> None:
    results = whole[1]
    for part in (
        "differences",
        "domains",
        "tasks",
        "generation",
        "behaviour",
        "efficiency",
        "gates",
        "drift",
        "long_context",
    ):
        assert results[part] == sample_evaluation.evaluation()[part]
    assert results["quantized"]["variants"][0]["name"] == "int8"


def test_intervals_say_of_how_few_documents_they_are(whole: Made) -> None:
    """The change since the baseline has its interval; fewer than 20 documents are told below the models' table."""
    text = words(whole[0])
    assert whole[1]["documents"] == 14
    assert "Mind: intervals rest on 14 documents; with fewer than 20 they are too narrow." in text
    assert "\N{MINUS SIGN}0.051 to +0.011" in text and "are compared by pairs" in text


def test_it_can_be_read_without_seeing_it(whole: Made) -> None:
    """Headings without a gap, tables with captions and headers of rows and columns, a label on every drawing."""
    document, _, directory = whole
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    tags = [tag for tag, _ in document.elements]
    assert tags.count("table") == tags.count("caption") > 12
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in document.elements if tag == "th")
    text = (directory / "index.html").read_text()
    for drawing in re.finditer(r"(<div[^>]*>)?<svg ([^>]*)>", text):
        assert "aria-label=" in (drawing[1] or "") or "aria-label=" in drawing[2]
    assert 'lang="en"' in text


def luminance(colour: str) -> float:
    """Of WCAG 2: of a colour as #rrggbb or #rgb."""
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stands_out_in_every_theme() -> None:
    style = (Path(graph.__file__).parent / "page.css").read_text()
    themes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+);", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        for text in ("ink", "muted", "accent", "bad"):
            for ground in ("paper", "wash"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground, theme)
        assert contrast(theme["faint"], theme["paper"]) >= 2  # lines that only guide the eye


def test_parts_that_were_not_measured_take_no_room(tmp_path: Path) -> None:
    write_sample_run(tmp_path / "quickstart")
    document, results, _ = make(tmp_path)
    ids = {attributes.get("id") for tag, attributes in document.elements if tag == "section"}
    assert not ids & {"gates", "domains", "tasks", "samples", "behaviour", "efficiency", "quantized"}
    assert {"models", "decision", "lineage"} <= ids and results["domains"] == {} and results["gates"] == []
    assert "within noise" not in document.text.partition("Distillation")[0].replace("is within noise of the lowest", "")


def test_gates_in_words() -> None:
    one = {"figure": "student.loss", "bound": 3.0, "below": 3.0, "value": 2.9, "passed": True, "why": ""}
    missing = {"figure": "student.tasks.mmlu", "bound": 0.9, "above": 0.9, "value": None, "passed": False}
    missing |= {"why": "student.tasks.mmlu above 0.9: not measured: no harness"}
    assert judgement.gates_in_words([]) == ""
    assert judgement.gates_in_words([one]) == "Its gate passed."
    assert judgement.gates_in_words([one, one]) == "All 2 gates passed."
    assert judgement.gates_in_words([missing]) == (
        "None of 1 gates passed. Failed: student.tasks.mmlu was not measured."
    )
    rows = judgement.gates([one, missing])
    assert rows and [row["failed"] for row in rows["rows"]] == [False, True]
    assert rows["rows"][1]["cells"][2]["text"] == "above 0.9" and "no harness" in rows["rows"][1]["note"]


def test_a_column_with_nothing_in_it_is_left_out() -> None:
    table = cells.table("a table", ("one", ("two", "unit")), [cells.row("a", [cells.figure(None), cells.figure(1.5)])])
    assert table and table["head"] == [{"title": "two", "unit": "unit", "ours": False}]
    assert table["rows"][0]["cells"][0]["text"] == "1.5000" and cells.table("none", ("one",), []) is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (999, "999 B"), (4_100_000, "4.1 MB"), (23_340_000, "23.3 MB"), (16.1e9, "16.1 GB")],
)
def test_bytes_in_words(value: float | None, shown: str) -> None:
    assert cells.bytes_in_words(value) == shown


def test_a_model_without_a_part_leaves_its_cells_empty() -> None:
    models = sample_evaluation.models({role: {"kl": 0.1, "agreement": 0.5} for role in sample_evaluation.MODELS})
    del models["pruned"]["by_token_class"]
    found = quality.token_classes(models)
    assert found and [column["title"] for column in found["head"]][1:3] == ["teacher, loss", "student, loss"]
    scores = sample_evaluation.evaluation()["tasks"]
    del scores["models"]["student"]["mmlu"]
    table = tasks.table(scores)
    assert table and [row["cells"][2]["text"] for row in table["rows"]] == ["0.690", "–"]


def test_the_graph_tells_what_was_read_and_what_has_changed_since(tmp_path: Path) -> None:
    run = write_sample_run(tmp_path / "quickstart", stages=("corpus", "teacher", "prune"))
    files = {"a.bin": "ab" * 32, "b.json": "cd" * 32}
    for stage, outputs in (("corpus", files), ("teacher", {f"hf/{name}": value for name, value in files.items()})):
        path = run / stage / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"outputs": outputs}))

    def drawn() -> dict[str, Any]:
        config = Config()
        config.run.directory = str(tmp_path)
        found = graph.draw(read_run(config))
        assert found
        return found

    found = drawn()
    assert [node["name"] for node in found["nodes"]] == ["corpus", "teacher", "prune"]
    assert not any(arc["stale"] for arc in found["arcs"]) and len(found["arcs"]) == 3
    assert found["words"] == "teacher from corpus; prune from corpus, teacher"
    path = run / "teacher" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"outputs": {"hf/a.bin": "ef" * 32}}))
    assert [arc["words"][:18] for arc in drawn()["arcs"] if arc["stale"]] == ["prune read teacher"]


def test_settings_in_words() -> None:
    settings = {"new_tokens": 64, "greedy": False, "temperature": 1e9, "top_p": 1.0, "prompts": "held-out text"}
    words = "new tokens 64, not greedy, temperature 1e+09, top p 1, prompts held-out text"
    assert sections._settings_in_words(settings) == words


def test_the_interval_of_a_share_ends_at_0_and_1(tmp_path: Path) -> None:
    assert tasks._ends({"value": 0.02, "stderr": 0.05}) == (0.0, pytest.approx(0.118))
    assert tasks._ends({"value": 0.99, "stderr": 0.05}) == (pytest.approx(0.892), 1.0)
    assert tasks._ends({"value": 9.3, "stderr": 1.0}) == (pytest.approx(7.34), pytest.approx(11.26))
    assert tasks._ends({"value": 0.5}) == (None, None)


def test_a_gap_that_has_grown_is_said_to_have_grown() -> None:
    results = {"models": {}, "parameters_kept": None, "student_minus_teacher": None, "efficiency": {}}
    assert page._highlights(results | {"pruning_gap_closed": -1.68}) == [
        {"title": "Pruning gap widened by", "value": "168.0%"}
    ]
    assert page._highlights(results | {"pruning_gap_closed": 0.5})[0]["title"] == "Pruning gap closed"


def test_names_of_marks_that_lie_close_together_stand_apart() -> None:
    """A student with its forms at the left, its teacher with its forms at the right, intervals wider than all."""
    placed: list[float] = []

    class Recorder:
        def annotate(self, text: str, at: tuple[float, float], **look: Any) -> None:
            placed.append(at[1])

    points = [(size, {"loss": 3 + place / 1000}) for place, size in enumerate((100, 25, 14, 26, 60, 16, 9, 17))]
    charts._names(Recorder(), [(x, row | {"name": "a", "kind": "quantized", "interval": [2, 4]}) for x, row in points])
    apart = [after - before for before, after in zip(placed, placed[1:], strict=False)]
    assert len(placed) == 8 and min(apart) >= 0.075 * 2 - 1e-9


def test_prompts_are_kept_apart_and_the_student_s_column_in_sight(whole: Made) -> None:
    text = (whole[2] / "index.html").read_text()
    assert "<bdi>" in text and '<p dir="auto">' in text and '<table class="sided">' in text
    assert ".sided .ours { position: sticky; right: 0;" in text
