"""The evaluate stage against transformers, plain float64 arithmetic and decoded text, at several layouts."""

import functools
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.choices import DomainKind, SourceKind
from pipelines.core import statistics
from pipelines.evaluation_settings import DomainConfig
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
PLACES = {"teacher": "teacher/hf", "pruned": "prune/hf", "student": "distil/hf"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("evaluate") / "runs")


def pieces(stream: np.ndarray, length: int, end: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels that a model sees at a time: windows, or with `end` the documents in each."""
    for start in range(0, len(stream) - 1, length):
        labels = stream[start + 1 : start + length + 1]
        inputs = stream[start : start + len(labels)]
        places = [0, *(np.flatnonzero(inputs == end) + 1), len(inputs)]
        for begin, stop in itertools.pairwise(places):
            if stop > begin:
                yield inputs[begin:stop], labels[begin:stop]


@functools.cache
def plain_tokens(root: Path, length: int = 16, end: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of each counted token: label, token before, place in its row, document, bytes; of each model: its figures there
    and "parameters"), from transformers' logits in float64, windows cut by hand, bytes from the vocabulary's pieces."""
    return plain_stream(root, small_run.ids_of_test_split(root), length, end)


def plain_stream(
    root: Path, stream: np.ndarray, length: int, end: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of any stream of ids."""
    cut = list(pieces(stream, length, end))
    counted = np.concatenate([inputs != end for inputs, _ in cut])
    before, labels = (np.concatenate([piece[side] for piece in cut])[counted] for side in (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(root / "small/corpus/tokenizer")
    ends = stream == end_of_document(root)
    # A byte-level token has a character for each byte, the end of a document none.
    special = tokenizer.all_special_tokens
    text = {number: token for token, number in tokenizer.get_vocab().items() if token not in special}
    common = {
        "before": before,
        "label": labels,
        "place": np.concatenate([np.arange(len(inputs)) for inputs, _ in cut])[counted],
        "document": (np.cumsum(ends) - ends)[1:][counted],
        "bytes": np.array([len(text.get(label, "")) for label in labels]),
        "counted": np.ones(len(labels)),
    }
    models: dict[str, Any] = {}
    for name, place in PLACES.items():
        model = AutoModelForCausalLM.from_pretrained(root / "small" / place, dtype=torch.float32).eval()
        with torch.no_grad():
            rows = [model(torch.tensor(inputs)[None]).logits[0].double().log_softmax(-1) for inputs, _ in cut]
        log = torch.cat(rows).numpy()[counted]
        p = models["teacher"]["log"] if models else log
        models[name] = {
            "log": log,
            "loss": -log[np.arange(len(labels)), labels],
            "kl": (np.exp(p) * (p - log)).sum(-1),
            "agreement": (p.argmax(-1) == log.argmax(-1)).astype(float),
            "confidence": np.exp(log.max(-1)),
            "correct": (log.argmax(-1) == labels).astype(float),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return common, models


def plain_results(root: Path, length: int = 16, end: int | None = None) -> dict[str, dict[str, float]]:
    """Every figure of the whole split."""
    common, models = plain_tokens(root, length, end)
    if end is None:
        tokenizer = AutoTokenizer.from_pretrained(root / "small/corpus/tokenizer")
        stream = small_run.ids_of_test_split(root)
        text = tokenizer.decode(stream[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert common["bytes"].sum() == len(text.encode())
    return {
        name: {figure: float(rows[figure].mean()) for figure in ("loss", "kl", "agreement")}
        | {
            "perplexity": math.exp(rows["loss"].mean()),
            "bits_per_byte": rows["loss"].sum() / math.log(2) / common["bytes"].sum(),
            "parameters": rows["parameters"],
        }
        for name, rows in models.items()
    }


def plain_class(before: str, text: str) -> str | None:
    """By the words of a token and of the one before it."""
    if not text:
        return None
    if any(character.isalpha() for character in text):
        inside = (text[0].isalpha() or text[0] == "'") and before[-1:].isalpha()
        return "word_inside" if inside else "word_start"
    if any(character.isdigit() for character in text):
        return "number"
    return "white_space" if text.isspace() else "other" if "\ufffd" in text else "punctuation"


def check_breakdowns(root: Path, results: dict[str, Any], end: int | None = None) -> None:
    """By class, position and confidence, and the intervals, from the tokens one by one."""
    common, models = plain_tokens(root, end=end)
    tokenizer = AutoTokenizer.from_pretrained(root / "small/corpus/tokenizer")
    text = [tokenizer.decode([number], skip_special_tokens=True) for number in range(small_run.VOCABULARY)]
    pairs = zip(common["before"], common["label"], strict=True)
    classes = np.array([str(plain_class(text[before], text[label])) for before, label in pairs])
    documents = [common["document"] == number for number in np.unique(common["document"])]
    draws = draws_of(len(documents))
    drawn = {}
    for name, rows in models.items():
        entry = results["models"][name]
        assert set(entry["by_token_class"]) == set(classes) - {"None"} >= {"word_start", "word_inside", "white_space"}
        for kind, found in entry["by_token_class"].items():
            expected = {figure: rows[figure][classes == kind].mean() for figure in ("loss", "kl", "agreement")}
            assert found == pytest.approx(expected | {"share": (classes == kind).mean()}, rel=1e-5, abs=1e-7)
        assert [(band["from"], band["to"]) for band in entry["by_position"]] == BANDS
        for band in entry["by_position"]:
            here = (common["place"] >= band["from"]) & (common["place"] < band["to"])
            expected = [rows[figure][here].mean() for figure in ("loss", "kl")]
            assert [band["loss"], band["kl"]] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        places = np.ceil(rows["confidence"] * 15) - 1
        for place, found in enumerate(entry["reliability"]):
            here = places == place
            assert found["share"] == pytest.approx(here.mean(), abs=1e-3)  # fp32 may put one token in the next bin
            if found["share"] == here.mean() > 0:
                assert found["accuracy"] == pytest.approx(rows["correct"][here].mean())
                assert found["confidence"] == pytest.approx(rows["confidence"][here].mean(), rel=1e-5)
        gaps = [row["share"] * abs(row["accuracy"] - row["confidence"]) for row in entry["reliability"] if row["share"]]
        assert len(entry["reliability"]) == 15 and entry["calibration_error"] == pytest.approx(sum(gaps), rel=1e-9)
        sums = {figure: np.array([rows[figure][d].sum() for d in documents])[draws].sum(1) for figure in FIGURES}
        counts = [np.array([common[key][d].sum() for d in documents])[draws].sum(1) for key in ("counted", "bytes")]
        drawn[name] = {figure: sums[figure] / counts[0] for figure in FIGURES}
        drawn[name]["bits_per_byte"] = sums["loss"] / math.log(2) / counts[1]
        for figure, found in entry["intervals"].items():
            assert found == pytest.approx(np.percentile(drawn[name][figure], [2.5, 97.5]).tolist(), rel=1e-5), figure
        assert set(entry["intervals"]) == ({"loss", "bits_per_byte"} if name == "teacher" else set(drawn[name]))
    groups = results["document_groups"]
    assert groups["bytes"] == [common["bytes"][d].sum() for d in documents] and len(groups["tokens"]) == len(documents)
    for name, rows in models.items():
        expected = [rows["kl"][d].sum() for d in documents]
        assert groups["models"][name]["kl"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found = {(row["figure"], row["model"], row["other"]): row for row in results["differences"]}
    assert len(found) == 6 and results["documents"] == len(documents)
    for (figure, model, other), row in found.items():
        low, high = np.percentile(drawn[model][figure] - drawn[other][figure], [2.5, 97.5])
        assert [row["low"], row["high"]] == pytest.approx([low, high], rel=1e-4, abs=1e-6)
        whole = [results["models"][name][figure] for name in (model, other)]
        assert row["difference"] == pytest.approx(whole[0] - whole[1], rel=1e-9)
        assert row["larger_than_noise"] == (low > 0 or high < 0)


BANDS = [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
FIGURES = ("loss", "kl", "agreement")


def draws_of(documents: int) -> np.ndarray:
    """(resamples, documents): which documents each resample has."""
    generator = torch.Generator().manual_seed(statistics.SEED)
    return torch.randint(documents, (statistics.RESAMPLES, documents), generator=generator).numpy()


def read_results(root: Path, name: str = "small") -> dict[str, Any]:
    return json.loads((root / name / "evaluate" / "results.json").read_text())


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"parallel__tensor": 1}),
        (2, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
        (2, {"parallel__tensor": 1}),
        (2, {"parallel__tensor": 1, "parallel__pipeline": 2}),
    ],
)
def test_equals_transformers(ranks: RankPools, root: Path, world: int, settings: dict[str, Any]) -> None:
    stream = small_run.ids_of_test_split(root)
    windows = -(-(len(stream) - 1) // 16)
    assert (len(stream) - 1) % 16 and windows % 5 and windows % 10  # neither the last window nor the last round is full
    figures = ranks(world, CASE, stage="evaluate", root=str(root), **settings)
    assert "error" not in figures[0], figures[0]
    results, expected = read_results(root), plain_results(root)
    assert results["tokens"] == len(stream) - 1 and results["split"] == "test" and not results["missing"]
    assert expected["student"]["kl"] > 0.1
    for name, row in expected.items():
        for figure, value in row.items():
            assert results["models"][name][figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, figure)
        assert results["models"][name]["tokens_per_second"] > 0
    check_breakdowns(root, results)


@pytest.mark.parametrize("settings", [{"parallel__tensor": 2}, {"parallel__pipeline": 2}], ids=["tp2", "pp2"])
def test_documents_apart_equal_transformers_document_by_document(
    ranks: RankPools, root: Path, settings: dict[str, Any]
) -> None:
    end = end_of_document(root)
    figures = ranks(2, CASE, stage="evaluate", root=str(root), distil__document_mask=True, **settings)
    assert "error" not in figures[0], figures[0]
    results, expected, stream = read_results(root), plain_results(root, end=end), small_run.ids_of_test_split(root)
    assert results["document_mask"] and results["tokens"] == (stream[:-1] != end).sum() < len(stream) - 1
    for name, row in expected.items():
        for figure, value in row.items():
            assert results["models"][name][figure] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, figure)
    check_breakdowns(root, results, end)


LEGAL = [" ".join(["naïve", "law", "über"] * (3 + number)) + "." for number in range(8)]


def test_domains_side_by_side_and_gaps_beside_them(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    """One of JSON lines against transformers; one cut short; of five that cannot be read each its reason."""
    (tmp_path / "law.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in LEGAL))
    (tmp_path / "long.txt").write_text("def value\n" * 300)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin1"))
    paths = {"law": "law.jsonl", "long": "long.txt", "none": "none.txt", "empty": "empty.txt", "latin": "latin.txt"}
    given = [DomainConfig(name, str(tmp_path / path), text_key="body", tokens=100) for name, path in paths.items()]
    given[0].tokens, given[1].kind = 10_000, DomainKind.other
    given.append(DomainConfig("prose", source=SourceKind.package_descriptions, tokens=50))
    ranks(2, CASE, stage="evaluate", root=str(root), parallel__tensor=2, evaluate__domains=given, evaluate__batches=1)
    results = read_results(root)
    assert set(results["domains"]) == {"law", "long", "prose"}
    for name, reason in {"none": "found nothing", "empty": "found none", "latin": "expected UTF-8"}.items():
        assert reason in results["missing"][f"domains.{name}"]
    long, law = results["domains"]["long"], results["domains"]["law"]
    assert (long["kind"], law["kind"], long["tokens"]) == ("other", "own", 99) and long["models"]["student"][
        "intervals"
    ] == {}
    tokenizer, end = AutoTokenizer.from_pretrained(root / "small/corpus/tokenizer"), end_of_document(root)
    stream = np.concatenate([[*tokenizer.encode(text, add_special_tokens=False), end] for text in LEGAL])
    common, models = plain_stream(root, stream, 16)
    assert law["documents"] == len(LEGAL) and law["tokens"] == len(stream) - 1
    assert (
        law["bytes"] == common["bytes"].sum() == sum(len(t.encode()) for t in LEGAL) - len(tokenizer.decode(stream[:1]))
    )
    documents = [common["document"] == number for number in range(len(LEGAL))]
    for name, rows in models.items():
        found = law["models"][name]
        for figure in FIGURES:
            assert found[figure] == pytest.approx(rows[figure].mean(), rel=1e-5, abs=1e-7)
        bits = rows["loss"].sum() / math.log(2) / common["bytes"].sum()
        assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        sums = np.array([[rows["loss"][d].sum(), d.sum()] for d in documents])[draws_of(len(LEGAL))].sum(1)
        expected = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist()
        assert found["intervals"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert {(row["model"], row["other"]) for row in law["differences"]} == {
        ("student", "teacher"),
        ("student", "pruned"),
    }


def end_of_document(root: Path) -> int:
    return json.loads((root / "small/corpus/blend.json").read_text())["eod"]


def test_long_documents_by_position(ranks: RankPools, root: Path) -> None:
    """At lengths beyond that of the split's windows; one that no document has is a gap."""
    stream, end = small_run.ids_of_test_split(root), end_of_document(root)
    ends = np.flatnonzero(stream == end) + 1
    documents = [d for d in np.split(stream, ends) if len(d) > 48]
    ranks(2, CASE, stage="evaluate", root=str(root), evaluate__long_context=[48, 4000])
    results = read_results(root)
    assert "expected documents of more than 4000 tokens" in results["missing"]["long_context.4000"]
    found = results["long_context"]["48"]
    assert found["documents"] == len(documents) > 2 and found["tokens"] == 48 * len(documents)
    model = AutoModelForCausalLM.from_pretrained(root / "small/distil/hf", dtype=torch.float32).eval()
    losses = []
    for document in documents:
        ids = torch.tensor(document[:49].astype(np.int64))[None]
        with torch.no_grad():
            log = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
        losses.append(-log.gather(1, ids[0, 1:, None])[:, 0].numpy())
    by_place = np.stack(losses)
    student = found["models"]["student"]
    assert student["loss"] == pytest.approx(by_place.mean(), rel=1e-5)
    assert [(band["from"], band["to"]) for band in student["by_position"]] == [*BANDS, (16, 32), (32, 48)]
    for band in student["by_position"]:
        assert band["loss"] == pytest.approx(by_place[:, band["from"] : band["to"]].mean(), rel=1e-5)


def test_drift_from_a_baseline(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    """The same models have not moved; a changed student has, on the documents that both were measured on."""
    from safetensors.torch import load_file, save_file

    runs, baseline = tmp_path / "runs", str(tmp_path / "baseline.json")
    shutil.copytree(root, runs)
    ranks(1, CASE, stage="evaluate", root=str(runs))
    shutil.copy(runs / "small/evaluate/results.json", baseline)
    ranks(1, CASE, stage="evaluate", root=str(runs), evaluate__baseline=baseline)
    rows = read_results(runs)["drift"]
    assert len(rows) == 2 + 4 + 4 and not any(row["difference"] or row["larger_than_noise"] for row in rows)
    (path,) = (runs / "small/distil/hf").glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.5
    save_file(weights, path, {"format": "pt"})
    ranks(1, CASE, stage="evaluate", root=str(runs), evaluate__baseline=baseline)
    results, before = read_results(runs), json.loads(Path(baseline).read_text())
    moved = {row["figure"]: row for row in results["drift"]}
    assert all(not row["difference"] for name, row in moved.items() if not name.startswith("student."))
    sums = [np.array(each["document_groups"]["models"]["student"]["loss"]) for each in (results, before)]
    tokens = np.array(before["document_groups"]["tokens"])
    draws = draws_of(len(tokens))
    drawn = [(one[draws].sum(1) / tokens[draws].sum(1)) for one in sums]
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    loss = moved["student.loss"]
    assert [loss["low"], loss["high"]] == pytest.approx([low, high], rel=1e-6)
    assert loss["larger_than_noise"] and loss["difference"] == loss["now"] - loss["before"] and low > 0
    assert loss["before"] == before["models"]["student"]["loss"]
    for key, value in {"corpus": "other", "tokens": 7}.items():
        Path(baseline).write_text(json.dumps(before | {key: value}))
        ranks(1, CASE, stage="evaluate", root=str(runs), evaluate__baseline=baseline, evaluate__batches=None)
        reason = read_results(runs)["missing"]["drift"]
        assert f"found {key}={value} where this one has {results[key]}" in reason and "drift" not in read_results(runs)


def test_a_limit_takes_that_many_windows(ranks: RankPools, root: Path) -> None:
    ranks(1, CASE, stage="evaluate", root=str(root), evaluate__batches=2)
    results = read_results(root)
    assert results["windows"] == 10 and 144 < results["tokens"] <= 160


def test_without_a_student_the_others_are_evaluated(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/small/distil")
    ranks(1, CASE, stage="evaluate", root=str(tmp_path / "runs"))
    results = read_results(tmp_path / "runs")
    assert set(results["models"]) == {"teacher", "pruned"}
    assert "stage=distil has not finished" in results["missing"]["student"]


def test_a_student_that_is_given_takes_the_place_of_the_distilled_one(ranks: RankPools, root: Path) -> None:
    ranks(1, CASE, stage="evaluate", root=str(root), evaluate__student=str(root / "small/prune/hf"))
    models = read_results(root)["models"]
    assert models["student"]["path"] == str(root / "small/prune/hf") and models["student"]["loss"] == pytest.approx(
        models["pruned"]["loss"]
    )


def test_user_mistakes_are_named(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    def error(**settings: Any) -> str:
        return str(ranks(1, CASE, stage="evaluate", root=str(root), **settings)[0]["error"])

    assert "expected a split 'nowhere'" in error(evaluate__split="nowhere")
    assert "expected a teacher" in error(name="other")
    shutil.copytree(root, tmp_path / "runs")
    path = tmp_path / "runs/small/corpus/blend.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 302}))
    (found,) = ranks(1, CASE, stage="evaluate", root=str(tmp_path / "runs"))
    assert "expected a tokenizer of at most the 301 ids of the model" in found["error"]


def test_not_a_number_names_the_model(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(root, tmp_path / "runs")
    (path,) = (tmp_path / "runs/small/distil/hf").glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    found = ranks(2, CASE, stage="evaluate", root=str(tmp_path / "runs"), parallel__tensor=2)
    assert all("UserError: student: expected a finite loss, found nan" in each["error"] for each in found)


def test_bits_per_byte_of_a_uniform_model_is_known() -> None:
    from pipelines.evaluation.comparison import figures
    from pipelines.model.quality import Quality

    found = figures(Quality(tokens=10, loss=math.log(256), kl=None, agreement=None, text_bytes=20.0))
    assert found["bits_per_byte"] == pytest.approx(4.0) and found["perplexity"] == pytest.approx(256)
