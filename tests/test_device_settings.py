"""Settings that ask something of the device: refused by name where it is not there, before anything starts."""

import importlib.util
import json
from pathlib import Path

import pytest

from pipelines import config as configuration
from pipelines import planning
from pipelines.compose import compose
from pipelines.config import Layout, TeacherMode, UserError, layout, without_context
from pipelines.stages import PIPELINE
from pipelines.validation import layouts, validate

pytestmark = pytest.mark.usefixtures("machine_without_gpu")

STAGES = ["corpus", "distil"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Two GPUs, and nothing installed but the packages that a test puts into what this returns."""
    installed: set[str] = set()
    monkeypatch.setattr(configuration, "gpu_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    return installed


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", *overrides]), STAGES)
    return str(caught.value)


def accepted(*overrides: str) -> None:
    validate(compose(["experiment=quickstart", *overrides]), STAGES)


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_a_fused_optimizer_needs_a_gpu(name: str) -> None:
    message = refusal(f"distil.optimizer={name}")
    assert message.startswith(
        f"distil.optimizer: expected auto or torch on the CPU, found {name}. Use distil.optimizer="
    )
    accepted("distil.optimizer=torch")


def test_an_optimizer_that_is_not_installed_is_named(gpus: set[str]) -> None:
    assert "found transformer_engine without transformer_engine. Use" in refusal("distil.optimizer=transformer_engine")
    gpus.add("apex")  # on the package index this is another project
    assert "found apex without amp_C. Use" in refusal("distil.optimizer=apex")
    gpus.update({"amp_C", "transformer_engine"})
    accepted("distil.optimizer=apex")
    accepted("distil.optimizer=transformer_engine")


FP8 = "distil.teacher_precision=fp8"
# A teacher of 256 channels, 768 neurons, 8 heads and 4 groups of 32.
SHAPE = [f"model.shape.{size}" for size in ("hidden_size=256", "intermediate_size=768", "head_dim=32")]


def test_a_teacher_in_fp8_needs_a_gpu_with_transformer_engine(gpus: set[str]) -> None:
    gpu = [*SHAPE, "parallel.device=auto", FP8]
    assert refusal(*SHAPE, "parallel.device=cpu", FP8).startswith(
        "distil.teacher_precision: expected fp32 or bf16 on the CPU, found fp8. Set it to bf16."
    )
    assert "expected fp32 or bf16 without Transformer Engine, found fp8" in refusal(*gpu)
    gpus.add("transformer_engine")
    accepted(*gpu)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.shape.intermediate_size=784", "multiples of 16 in fp8, found fp8 with 392 neurons on each rank"),
        ("model.shape.head_dim=20", "found fp8 with 40 channels of queries on each rank"),
        ("distil.sequence_length=129", "a multiple of 8 tokens in fp8, found fp8 with 516 tokens on each rank"),
    ],
)
def test_sizes_that_fp8_does_not_take_are_named(gpus: set[str], override: str, expected: str) -> None:
    gpus.add("transformer_engine")
    message = refusal(*SHAPE, FP8, "distil.micro_batch_size=4", override)
    assert message.startswith("distil.teacher_precision: expected") and expected in message


def test_a_teacher_in_fp8_stays_on_the_device(gpus: set[str]) -> None:
    gpus.add("transformer_engine")
    message = refusal(*SHAPE, FP8, "distil.teacher_offload=true")
    assert message.startswith("distil.teacher_offload: expected false with distil.teacher_precision=fp8, found true")
    accepted(*SHAPE, "distil.teacher_precision=bf16", "distil.teacher_offload=true")


def test_pipeline_stages_send_whole_columns() -> None:
    """A student in fp32 sends its teacher's bf16 states two to a column."""
    given = [*SHAPE, "student=custom", "distil.precision=fp32", "distil.teacher_precision=bf16"]
    given += ["model.shape.hidden_size=255", "model.shape.vocab_size=4096"]
    accepted(*given, "parallel.tensor=1", "parallel.pipeline=1")
    message = refusal(*given, "parallel.tensor=1", "parallel.pipeline=2")
    assert message.startswith(
        "distil.teacher_precision: expected fp32 beside a student in fp32 with parallel.pipeline=2"
    )


CONTEXT = ["parallel.context=2", "parallel.tensor=1", "distil.precision=bf16", "teacher.precision=bf16"]
EVERY_STAGE = list(PIPELINE)


def test_every_stage_of_a_run_takes_context_parallel_ranks(gpus: set[str]) -> None:
    """Teacher and distil cut their sequences; the others give the same ranks rows of their own."""
    gpus.add("transformer_engine")
    config = compose(["experiment=quickstart", *CONTEXT, "evaluate.sequence_length=127", "prune.sequence_length=127"])
    validate(config, EVERY_STAGE)
    ranks = layout(config.parallel)
    assert (ranks.context, ranks.data) == (2, 1)
    assert without_context(ranks) == Layout(2, 1, 1, 1, 2, "cuda", False)


@pytest.mark.parametrize(
    ("stages", "overrides", "expected"),
    [
        (
            ["distil"],
            ["parallel.device=cpu", "parallel.processes=2"],
            "1 in stage distil without a GPU and Transformer",
        ),
        (["verify"], [], "1 in stage verify, whose reference sees whole sequences, found 2"),
        (["distil"], ["distil.precision=fp32"], "distil.precision: expected bf16 with parallel.context=2, found fp32"),
        (
            ["distil"],
            ["distil.teacher_precision=fp32"],
            "distil.teacher_precision: expected bf16 with parallel.context",
        ),
        (
            ["teacher"],
            ["teacher.precision=fp32"],
            "teacher.precision: expected bf16 with parallel.context=2, found fp32",
        ),
        (["distil"], ["distil.sequence_length=126"], "a multiple of 2 * parallel.context=4, found 126"),
        (["distil"], ["distil.attention=[{kind: kl}]"], "parallel.context=1"),
        (["distil"], ["distil.document_mask=true"], "distil.document_mask: expected false with parallel.context=2"),
    ],
)
def test_what_context_parallelism_does_not_take_is_named(
    gpus: set[str], stages: list[str], overrides: list[str], expected: str
) -> None:
    gpus.add("transformer_engine")
    with pytest.raises(UserError) as caught:
        validate(compose(["experiment=quickstart", *CONTEXT, *overrides]), ["corpus", *stages])
    assert expected in str(caught.value)


def test_sequence_parallelism_cuts_the_parts_of_context_parallel_ranks_again() -> None:
    ranks = Layout(8, 4, 1, 2, 1, "cuda", True)
    teacher = planning.shape_from_config(compose([]).model.shape)
    with pytest.raises(UserError, match=r"multiple of parallel.tensor \* parallel.context=8 under .* found 132"):
        layouts.check_length("distil", 132, ranks, teacher)
    layouts.check_length("distil", 136, ranks, teacher)
    layouts.check_length("evaluate", 132, ranks, teacher)  # whose sequences stay whole


def test_context_parallelism_has_no_sliding_window(gpus: set[str], tmp_path: Path) -> None:
    gpus.add("transformer_engine")
    config = compose(["experiment=quickstart", *CONTEXT])
    content = planning.shape_from_config(config.model.shape).replace(architecture="MistralForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(content.to_hugging_face() | {"sliding_window": 64}))
    config.model.path, config.teacher.mode = str(tmp_path), TeacherMode.take
    with pytest.raises(
        UserError, match=r"parallel.context: expected 1 with a sliding window, found 2 with a window of 64"
    ):
        validate(config, ["distil"])


def test_sequences_of_the_long_recipe_divide_over_its_ranks(monkeypatch: pytest.MonkeyPatch, gpus: set[str]) -> None:
    gpus.add("transformer_engine")
    monkeypatch.setattr(configuration, "gpu_count", lambda: 8)
    config = compose(["experiment=llama31_8b_to_4b_32k"])
    validate(config, ["plan"])
    ranks, distil = layout(config.parallel), config.distil
    assert (ranks.tensor, ranks.context, ranks.data) == (4, 2, 1)
    assert distil.sequence_length % (2 * ranks.context * ranks.tensor) == 0 and distil.recompute
    assert distil.global_batch_size * distil.sequence_length == 1152 * 8192, "the recipe's tokens to a step"
