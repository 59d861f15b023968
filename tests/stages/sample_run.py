"""A run's directory as the stages leave it, with made-up numbers: what the report is tested on."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, FFN, HEADS = 6, 256, 768, 8
SEED = 7


def write_sample_run(
    directory: Path, *, stages: tuple[str, ...] = ("corpus", "teacher", "prune", "distil", "evaluate", "export")
) -> Path:
    """Write <directory>/<stage>/... for each stage. Returns directory."""
    writers = {"corpus": _corpus, "teacher": _teacher, "prune": _prune, "distil": _distil, "evaluate": _evaluate}
    for number, stage in enumerate(stages):
        (directory / stage).mkdir(parents=True)
        _manifest(directory, stage, seconds=(4.2, 181.0, 9.5, 204.3, 21.8, 6.4)[number])
        writers.get(stage, _export)(directory / stage)
    return directory


def _manifest(directory: Path, stage: str, seconds: float) -> None:
    parents = {"teacher": ["corpus"], "prune": ["corpus", "teacher"], "distil": ["corpus", "teacher", "start"]}
    inputs = {
        name: {"path": str(directory / name), "files": {"a.bin": "ab" * 32, "b.json": "cd" * 32}}
        for name in parents.get(stage, ["corpus", "student"] if stage != "corpus" else [])
    }
    _write(
        directory / stage / "manifest.json",
        {
            "stage": stage,
            "started": "2026-11-22T10:00:00+00:00",
            "finished": "2026-11-22T10:04:00+00:00",
            "seconds": seconds,
            "settings": {},
            "inputs": inputs,
            "git": "0123456789abcdef0123456789abcdef01234567-dirty",
            "versions": {"python": "3.11.9", "torch": "2.13.0", "megatron-core": "0.15.3"},
            "layout": {"processes": 2, "tensor": 2, "pipeline": 1, "context": 1, "data": 1, "device": "cpu"},
            "seed": 1234,
            "figures": {"loss": "loss = 1.0 * T^2 * KL(teacher || student, T=1.0) + 0.0 * CE"},
        },
    )
    (directory / stage / "complete").write_text("x\n")


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def _corpus(directory: Path) -> None:
    split = {"documents": 40, "tokens": 40_000, "bytes": 130_000, "bytes_per_token": 3.25}
    _write(directory / "counts.json", {"splits": {"train": split, "test": split}, "unigram_entropy": 6.91})


def _curve(directory: Path, steps: int, start: float, end: float, *, kd: bool) -> None:
    random = np.random.default_rng(SEED)
    rows = []
    for step in range(1, steps + 1):
        value = end + (start - end) * math.exp(-4 * step / steps)
        terms = {"kd": value - end + 0.03, "ce": value} if kd else {"ce": value}
        train = {name: number + 0.05 * random.standard_normal() * number for name, number in terms.items()}
        rows.append({"step": step, "split": "train", "loss": train[next(iter(train))], **train})
        if step % 20 == 0:
            watched = _watched(terms["kd"]) if kd else {}
            rows.append({"step": step, "split": "validation", "loss": terms[next(iter(terms))], **terms, **watched})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _watched(kd: float) -> dict[str, float]:
    """What a validation of distillation tells besides; no token of this teacher has an entropy of 4 or more."""
    bands = {f"kd_entropy_{band}": factor * kd for band, factor in (("0_1", 0.4), ("1_2", 0.9), ("2_4", 1.3))}
    shares = {"agreement": math.exp(-kd / 2), "overlap": math.exp(-kd / 1.5)}
    return bands | shares | {"student_calibration_error": 0.02 + kd / 20, "teacher_calibration_error": 0.021}


def _teacher(directory: Path) -> None:
    _curve(directory, 300, 8.3, 2.9, kd=False)


def _prune(directory: Path) -> None:
    random = np.random.default_rng(SEED)
    scores = {
        "hidden": np.sort(random.lognormal(0, 0.7, HIDDEN)),
        **{f"ffn.{n}": random.lognormal(0, 1, FFN) for n in range(1, LAYERS + 1)},
        **{f"heads.{n}": random.lognormal(0, 0.5, HEADS) for n in range(1, LAYERS + 1)},
        "block_influence": random.uniform(0.1, 0.6, LAYERS),
    }
    save_file(scores, directory / "scores.safetensors")
    kept = {
        "hidden": _best(scores["hidden"], 192),
        "ffn": {str(n): _best(scores[f"ffn.{n}"], 512) for n in range(1, LAYERS + 1)},
        "heads": {str(n): _best(scores[f"heads.{n}"], 6) for n in range(1, LAYERS + 1)},
        "layers": list(range(1, LAYERS + 1)),
        "teacher": {"hidden_size": HIDDEN},
        "student": {"hidden_size": 192},
    }
    _write(directory / "kept.json", kept)


def sample_search() -> dict[str, Any]:
    """search.json of a search that distilled three of eight candidates, after one that measured a ninth."""
    random, candidates = np.random.default_rng(SEED), {}
    for number, (hidden, ffn, heads, layers) in enumerate(
        ((192, 512, 8, 6), (208, 480, 8, 5), (224, 576, 8, 4), (192, 544, 6, 6), (176, 608, 8, 6), (240, 480, 6, 4))
        + ((256, 672, 8, 3), (192, 768, 8, 4))
    ):
        entry = {
            "parameters": 3_301_440 - 60_000 * number,
            "bytes_per_gpu": 3_400_000,
            "tokens_per_second": 30_000.0 + 2_500 * (6 - layers) + 200 * number,
            "predicted": 3.9 + 0.07 * number + 0.15 * (6 - layers),
            "measured": 4.2 + 0.11 * number + 0.2 * (6 - layers) + 0.02 * random.standard_normal(),
        }
        if number < 3:
            entry |= {"distilled": {"steps": 20, "tokens": 40_960, "ce": (3.21, 3.18, 3.34)[number]}}
        candidates[f"h{hidden}-f{ffn}-a{heads}-g4-l{layers}"] = entry
    measured = list(candidates)
    candidates["h256-f768-a8-g4-l8"] = {"parameters": 3_800_000, "predicted": 3.1, "measured": 3.2}
    return {
        "source": {"seed": 1},
        "limits": {"parameters": 3.31e6},
        "within": 512,
        "speeds": "modelled for H100 in bf16",
        "teacher": {"loss": 2.9},
        "sensitivities": {"hidden_size": {"192": 0.4}},
        "candidates": candidates,
        "measured": measured,
        "why": "h208-f480-a8-g4-l5 has validation loss 3.1800 after distillation",
        "winner": "h208-f480-a8-g4-l5",
    }


def _best(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(-scores)[:count].tolist())


def _distil(directory: Path) -> None:
    _curve(directory, 200, 5.4, 2.95, kd=True)


def sample_models() -> dict[str, dict[str, Any]]:
    models = {}
    for role, parameters, loss, kl, agreement, overlap, calibration, speed in (
        ("teacher", 5_834_240, 2.90, 0.0, 1.0, 1.0, 0.0113, 21_034.0),
        ("pruned", 3_301_440, 5.40, 2.61, 0.31, 0.284, 0.1521, 35_120.0),
        ("student", 3_301_440, 2.93, 0.041, 0.913, 0.887, 0.0187, 35_377.0),
    ):
        models[role] = {
            "parameters": parameters,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / 3.25,
            "kl": kl,
            "agreement": agreement,
            "overlap": overlap,
            "calibration_error": calibration,
            "tokens_per_second": speed,
        }
    return models


def _evaluate(directory: Path) -> None:
    results = {"split": "test", "tokens": 39_936, "bytes": 129_800, "models": sample_models(), "missing": {}}
    _write(directory / "results.json", results)


def _export(directory: Path) -> None:
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text("{}")
