"""The parts that results.json of an evaluation may have beside the models, and quantized.json, with made-up numbers."""

from typing import Any

LOSSES = {"teacher": 2.90, "pruned": 5.40, "student": 2.93}
MODELS = tuple(LOSSES)
CLASSES = {"word start": 0.52, "word inside": 0.21, "digit": 0.04, "punctuation": 0.13, "whitespace": 0.10}


def models(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """found: of sample_run.sample_models; each gets what is looked at closely."""
    for number, (role, model) in enumerate(found.items()):
        loss, sure = LOSSES[role], (0.02, 0.2, 0.04)[number]
        model["kl_by_entropy"] = {"0_1": 0.01 * number, "1_2": 0.03 * number, "2_4": 0.05 * number, "4_up": 0.06}
        model["by_token_class"] = {
            name: {"share": share, "loss": loss * factor, "kl": model["kl"] * factor, "agreement": 1 - 0.1 * number}
            for (name, share), factor in zip(CLASSES.items(), (1.2, 0.5, 1.5, 0.7, 0.4), strict=True)
        }
        model["by_position"] = [
            {"from": 32 * n, "to": 32 * (n + 1), "loss": loss + 0.8 / (n + 1), "kl": model["kl"] * (1 + 0.02 * n)}
            for n in range(8)
        ]
        model["reliability"] = [
            {
                "confidence": (n + 0.5) / 15 if n > 1 else None,
                "accuracy": max((n + 0.5) / 15 - sure, 0.0) if n > 1 else None,
                "share": 0.3 / (n + 1) if n > 1 else 0.0,
            }
            for n in range(15)
        ]
        model["intervals"] = {
            "loss": [loss - 0.04, loss + 0.05],
            "kl": [model["kl"] * 0.9, model["kl"] * 1.1],
            "agreement": [model["agreement"] - 0.01, min(model["agreement"] + 0.01, 1.0)],
        }
    return found


def differences(**named: float) -> list[dict[str, Any]]:
    return [
        {
            "figure": "loss",
            "model": role,
            "other": "teacher",
            "difference": LOSSES[role] - 2.9,
            "low": low,
            "high": high,
        }
        | {"larger_than_noise": low > 0}
        for role, low, high in (("pruned", 2.4, 2.6), ("student", -0.002, 0.061))
    ] + [
        {"figure": "bits_per_byte", "model": "student", "other": "teacher", "difference": 0.013, "low": 0.004}
        | {"high": 0.021, "larger_than_noise": True}
    ]


def evaluation() -> dict[str, Any]:
    return {
        "documents": 14,
        "differences": differences(),
        "domains": _domains(),
        "long_context": {str(length): _long(length) for length in (1024, 512)},
        "tasks": _tasks(),
        "generation": _generation(),
        "behaviour": _behaviour(),
        "efficiency": _efficiency(),
        "gates": [
            {"figure": "student.agreement", "bound": 0.9, "above": 0.9, "value": 0.913, "passed": True}
            | {"why": "student.agreement is 0.913, expected above 0.9"},
            {"figure": "student.kl", "bound": 0.03, "below": 0.03, "value": 0.041, "passed": False}
            | {"why": "student.kl is 0.041, expected below 0.03"},
        ],
        "drift": [
            {"figure": "student.loss", "before": 2.95, "now": 2.93, "difference": -0.02, "larger_than_noise": False}
            | {"low": -0.051, "high": 0.011}
        ],
    }


def _domains() -> dict[str, Any]:
    found = {}
    for name, kind, shift in (("contracts", "own", 0.1), ("news", "other", 0.6), ("code", "other", -0.4)):
        own = {
            role: {"loss": loss + shift, "bits_per_byte": 1.3 + shift / 5, "kl": 0.05 * number, "agreement": 0.9}
            | {"intervals": {"loss": [loss + shift - 0.06, loss + shift + 0.06]}}
            for number, (role, loss) in enumerate(LOSSES.items())
        }
        found[name] = {
            "path": f"{name}.jsonl",
            "kind": kind,
            "tokens": 12_000,
            "bytes": 40_000,
            "documents": 31,
            "models": own,
            "differences": differences(),
        }
    return found


def _long(length: int) -> dict[str, Any]:
    """Sequences of so many tokens; the student has no use for the last half of them."""
    bands = [(0, 1), (1, length // 4), (length // 4, length // 2), (length // 2, length)]
    own = {
        role: {"loss": loss - length / 1e4, "kl": 0.05 * number, "agreement": 0.9, "intervals": {}}
        | {
            "by_position": [
                {"from": low, "to": high, "loss": loss + 1 / (place + 1) + place * number / 10, "kl": 0.04 * number}
                for place, (low, high) in enumerate(bands)
            ]
        }
        for number, (role, loss) in enumerate(LOSSES.items())
    }
    return {
        "sequence_length": length,
        "tokens": 30_000,
        "documents": 31,
        "models": own,
        "differences": differences(),
    }


def _tasks() -> dict[str, Any]:
    scores = {
        role: {
            task: {"metric": metric, "value": base - lower, "stderr": 0.012, "shots": shots, "samples": 400, "all": {}}
            for task, metric, base, shots in (("corpus_choice", "acc", 0.71, 0), ("mmlu", "acc", 0.652, 5))
        }
        for role, lower in (("teacher", 0.0), ("pruned", 0.35), ("student", 0.02))
    }
    difference = {"model": "student", "other": "teacher", "difference": -0.02, "low": -0.05, "high": 0.01}
    return {
        "harness": "0.4.9.1",
        "models": scores,
        "published": {"teacher": {"mmlu": 0.653}, "student": {"mmlu": 0.605}},
        "differences": [{"task": "mmlu", **difference, "larger_than_noise": False}],
        "missing": {"gsm8k": "its data is not here."},
    }


def _generation() -> dict[str, Any]:
    texts = {
        "teacher": "    parser = argparse.ArgumentParser()\n    return parser.parse_args()",
        "pruned": " the the the <b>of</b> of of",
        "student": "    parser = argparse.ArgumentParser()\n    args = parser.parse_args()",
    }
    return {
        "settings": {"new_tokens": 32, "temperature": 0.0, "seed": 1},
        "models": {
            role: {
                "samples": [{"prompt": f"def main({number}", "text": text} for number in range(6)],
                "diversity": {"distinct_1": 0.4, "distinct_2": 0.7, "distinct_3": 0.85, "repetition": 0.02}
                | {"template_rate": 0.1, "mean_new_tokens": 30.5, "ended": 0.25},
            }
            for role, text in texts.items()
        },
    }


def _behaviour() -> dict[str, Any]:
    rates = {"prompts": 25, "refusal_rate": 0.04, "toxic_rate": 0.0}
    intervals = {"refusal_interval": [0.0, 0.12], "toxic_interval": [0.0, 0.11]}
    one = {"category": "harmless", "figure": "refusal_rate", "model": "student", "other": "teacher"}
    return {
        "file": "prompts.jsonl",
        "examples": [
            {"model": "student", "category": "harmful", "prompt": "How do I?", "text": "I cannot.", "refused": True}
            | {"toxic": False}
        ],
        "missing": {"pruned": "it is not here."},
        "models": {role: dict.fromkeys(("harmless", "harmful"), rates | intervals) for role in MODELS},
        "differences": [one | {"difference": 0.0, "low": -0.1, "high": 0.1, "larger_than_noise": False}],
    }


def _efficiency() -> dict[str, Any]:
    rows = []
    for batch in (1, 8):
        for role, factor in (("teacher", 1.0), ("student", 1.7)):
            rows.append(
                {
                    "model": role,
                    "batch": batch,
                    "prompt_tokens": 64,
                    "new_tokens": 32,
                    "time_to_first_token_ms": 21.0 * batch / factor,
                    "prefill_tokens_per_second": 3000.0 * factor,
                    "decode_tokens_per_second": 90.0 * batch * factor,
                    "latency_ms": {"p50": 310.0 / factor, "p90": 330.0 / factor, "p99": 351.0 / factor},
                    "ratio": {"time_to_first_token_ms": 1 / factor, "prefill_tokens_per_second": factor}
                    | {"decode_tokens_per_second": factor},
                }
            )
    return {
        "device": "cpu",
        "threads": 2,
        "dtype": "fp32",
        "form": "transformers 4.53.3",
        "rows": rows,
        "models": {
            "teacher": {"bytes_on_disk": 23_340_000, "peak_bytes": 410_000_000, "parameters": 5_834_240},
            "pruned": {"bytes_on_disk": 13_210_000, "peak_bytes": 310_000_000, "parameters": 3_301_440},
            "student": {"bytes_on_disk": 13_210_000, "peak_bytes": 310_000_000, "parameters": 3_301_440},
        },
    }


def quantized() -> dict[str, Any]:
    """int4 is worse than the student by more than noise, int8 is not, and fp8 cannot be made."""
    variants = [
        {"name": name, "of": "student", "method": name, "bits": int(name[3:]), "library": "compressed-tensors 0.9"}
        | {"directory": f"export/{name}", "bytes": size, "parameters": 3_301_440, "loss": loss, "bits_per_byte": 1.3}
        | {"kl": kl, "kl_to_student": kl / 9, "agreement": 0.9, "intervals": {"loss": [loss - 0.04, loss + 0.05]}}
        | {
            "differences": [
                {"figure": "loss", "model": name, "other": "student", "difference": loss - LOSSES["student"]}
                | {"low": low, "high": low + 0.02, "larger_than_noise": low > 0}
            ]
        }
        for name, size, loss, kl, low in (
            ("int8", 4_100_000, 2.934, 0.043, -0.002),
            ("int4", 2_600_000, 3.21, 0.27, 0.27),
        )
    ]
    refused = {"name": "fp8", "of": "student", "method": "fp8", "refused": "expected inputs that 32 divides, found 20."}
    return {"variants": [*variants, refused]}


def whole(results: dict[str, Any]) -> dict[str, Any]:
    """results: of sample_run's evaluation, with every part that there is."""
    return results | {"models": models(results["models"])} | evaluation() | {"missing": {"vllm": "not installed here."}}
