"""Documents apart, as settings: where they cannot be kept apart, and what tells it by name before anything starts."""

import importlib.util

import pytest

from pipelines import config as configuration
from pipelines.compose import compose
from pipelines.config import UserError, document_mask
from pipelines.validation import validate

pytestmark = pytest.mark.usefixtures("machine_without_gpu")


def refusal(stages: list[str], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", *overrides]), stages)
    return str(caught.value)


@pytest.mark.parametrize("stage", ["teacher", "distil"])
def test_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(configuration, "gpu_count", lambda: 2)
    given = ["parallel.context=2", "parallel.tensor=1", f"{stage}.document_mask=true", f"{stage}.precision=bf16"]
    message = refusal(["corpus", stage], *given)
    assert message.startswith(f"{stage}.document_mask: expected false with parallel.context=2, found true")
    validate(compose(["experiment=quickstart", *given, f"{stage}.document_mask=false"]), ["corpus", stage])


def test_pruning_scores_documents_apart_row_by_row() -> None:
    message = refusal(["corpus", "prune"], "prune.document_mask=true", "prune.micro_batch_size=8")
    assert message.startswith("prune.micro_batch_size: expected 1 with prune.document_mask=true, found 8")
    one = ["experiment=quickstart", "prune.document_mask=true", "prune.micro_batch_size=1"]
    validate(compose(one), ["corpus", "prune"])


@pytest.mark.parametrize("stage", ["teacher", "prune", "distil", "evaluate"])
def test_transformer_engine_needs_bf16(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Its kernels for the "thd" layout are of half precision; the plain layers take any."""
    given = ["experiment=quickstart", f"{stage}.document_mask=true", "prune.micro_batch_size=1"]
    stages = ["corpus", stage]
    validate(compose(given), stages)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    validate(compose(given), stages)  # on the CPU
    monkeypatch.setattr(configuration, "gpu_count", lambda: 2)
    message = refusal(stages, *given[1:], f"{stage}.precision=fp32")
    assert message.startswith(f"{stage}.precision: expected bf16 with {stage}.document_mask=true and Transformer Eng")
    validate(compose([*given, f"{stage}.precision=bf16"]), stages)


def test_transformer_engine_needs_bf16_of_the_frozen_teacher_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(configuration, "gpu_count", lambda: 2)
    given = ["distil.document_mask=true", "distil.precision=bf16", "distil.teacher_precision=fp32"]
    message = refusal(["corpus", "distil"], *given)
    assert message.startswith("distil.teacher_precision: expected bf16 with distil.document_mask=true and Transformer")


def test_transformer_engine_is_not_verified_with_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(configuration, "gpu_count", lambda: 2)
    assert refusal(["verify"], "verify.document_mask=true").startswith("verify.document_mask: expected false")
    validate(compose(["verify.document_mask=true", "parallel.device=cpu"]), ["verify"])


@pytest.mark.parametrize("entry", ["attention=[{kind: kl}]", "hidden=[{kind: relational}]"])
def test_losses_between_the_tokens_of_a_row_are_refused(entry: str) -> None:
    assert refusal(["corpus", "distil"], f"distil.{entry}", "distil.document_mask=true").startswith(
        "distil.document_mask: expected false with losses on attention or relations"
    )
    given = ["experiment=quickstart", "distil.hidden=[{kind: mse}]", "distil.document_mask=true"]
    validate(compose(given), ["corpus", "distil"])


def test_evaluation_follows_the_training_where_nothing_is_said() -> None:
    asked = {}
    for value in ("null", "true", "false"):
        for trained in ("true", "false"):
            config = compose([f"evaluate.document_mask={value}", f"distil.document_mask={trained}"])
            asked[value, trained] = document_mask(config, "evaluate")
            assert not document_mask(config, "export") and not document_mask(config, "teacher")
    assert asked == {
        ("null", "true"): True,
        ("null", "false"): False,
        ("true", "true"): True,
        ("true", "false"): True,
        ("false", "true"): False,
        ("false", "false"): False,
    }
