"""Speed on the page: each engine's rows are told apart, and no figure mixes them."""

from typing import Any

from pipelines.report import efficiency, variants


def row(engine: str, model: str, decode: float, teacher: float) -> dict[str, Any]:
    figures = {"time_to_first_token_ms": 5.0, "prefill_tokens_per_second": 900.0, "decode_tokens_per_second": decode}
    kind = {"engine": engine, "model": model, "batch": 1, "prompt_tokens": 64, "new_tokens": 32}
    return kind | figures | {"ratio": dict.fromkeys(figures, decode / teacher)}


def test_rows_of_vllm_name_it_and_stand_behind_those_of_transformers() -> None:
    rows = [row("vllm", "teacher", 500.0, 500.0), row("vllm", "student", 600.0, 500.0)]
    rows += [row("transformers", "teacher", 90.0, 90.0), row("transformers", "student", 180.0, 90.0)]
    table = efficiency.speeds({"rows": rows})
    assert table is not None
    setting = "batch 1, 64 + 32 tokens"
    assert [each["note"] for each in table["rows"]] == [setting] * 2 + [f"{setting}, vLLM"] * 2
    assert efficiency.decode_ratio({"rows": rows}) == 2.0
    assert variants._decode({"rows": rows}, "student") == 180.0
    assert variants._decode({"rows": rows[:3]}, "student") is None  # transformers has no row of it
    assert variants._decode({"rows": rows[:2]}, "student") == 600.0
