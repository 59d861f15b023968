"""Planning against the counts that were published for Llama-3.1-8B to 4B, and against counts taken another way."""

from dataclasses import replace

import pytest

from pipelines import device_memory, gpus, planning
from pipelines.activations import CHUNK_BYTES, CHUNK_TOKENS, activation_bytes
from pipelines.compose import compose
from pipelines.config import Layout, Precision, StudentConfig, UserError
from pipelines.families import ModelShape
from pipelines.signals import FeatureLoss

SMALL = ModelShape(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)


def ranks(tensor: int = 1, pipeline: int = 1, data: int = 1, sequence_parallel: bool = False) -> Layout:
    return Layout(tensor * pipeline * data, tensor, pipeline, 1, data, "cpu", sequence_parallel)


@pytest.mark.parametrize(
    ("experiment", "student", "student_inner"),
    [
        ("llama31_8b_to_4b_width", 4_512_746_496, 3_724_741_632),
        ("llama31_8b_to_4b_depth", 4_540_469_248, 3_489_796_096),
    ],
)
def test_counts_are_the_published_ones(experiment: str, student: int, student_inner: int) -> None:
    figures = planning.plan(compose([f"experiment={experiment}"]))
    assert figures["teacher"]["parameters"] == 8_030_261_248
    assert figures["teacher"]["non_embedding_parameters"] == 6_979_588_096
    assert figures["student"]["parameters"] == student
    assert figures["student"]["non_embedding_parameters"] == student_inner
    assert figures["steps"] == 9960
    assert figures["tokens"] == 9960 * 1152 * 8192


@pytest.mark.parametrize("name", ["width", "depth", "tutorial"])
def test_an_8b_teacher_is_held_in_two_bytes_per_weight_wherever_it_is_used(name: str) -> None:
    config = compose([f"experiment=llama31_8b_to_4b_{name}"])
    assert config.prune.precision is config.distil.precision is Precision.bf16
    assert config.evaluate.precision in (None, Precision.bf16)


@pytest.mark.parametrize("experiment", ["quickstart", "quickstart_depth"])
def test_the_quickstarts_student_is_small_enough(experiment: str) -> None:
    assert planning.plan(compose([f"experiment={experiment}"]))["student_share"] <= 0.6


def test_speed_in_percent_of_peak_and_plan() -> None:
    assert planning.speed_figures(100.0, 3, None) == {"tokens_per_second": 100.0, "flops_per_second": 300.0}
    figures = planning.speed_figures(100.0, 3, 1000.0)
    assert figures["percent_of_peak"] == pytest.approx(30) and figures["percent_of_plan"] == pytest.approx(75)


def test_flops_per_token_are_those_of_the_recipe() -> None:
    figures = planning.plan(compose(["experiment=llama31_8b_to_4b_width"]))
    parts = figures["flops_per_token_parts"]
    assert figures["flops_per_token_without_attention"] / 1e9 == pytest.approx(39.7, abs=0.05)
    assert parts["teacher"] / 1e9 == pytest.approx(15.0, abs=0.05)
    assert parts["student"] / 1e9 == pytest.approx(24.7, abs=0.05)
    assert parts["attention"] / 1e9 == pytest.approx(8.6, abs=0.05)
    assert figures["flops_per_token"] / 1e9 == pytest.approx(48.3, abs=0.05)


def test_parameters_of_a_shape_counted_by_hand() -> None:
    layer = 32 * 48 + 2 * 32 * 24 + 48 * 32 + 3 * 32 * 48 + 2 * 32
    assert SMALL.non_embedding_parameters() == 4 * layer + 32
    assert SMALL.parameters() == 4 * layer + 32 + 2 * 99 * 32
    assert SMALL.replace(tie_word_embeddings=True).parameters() == 4 * layer + 32 + 99 * 32


def test_matrix_parameters_leave_norms_and_the_embedding_out_and_the_head_in() -> None:
    expected = SMALL.non_embedding_parameters() - (2 * 4 + 1) * 32 + 99 * 32
    assert planning.matrix_parameters(SMALL) == expected
    assert planning.matrix_parameters(SMALL.replace(tie_word_embeddings=True)) == expected


def test_a_shard_holds_its_part_of_the_matrices_all_norms_and_padded_rows() -> None:
    norms, matrices = (2 * 4 + 1) * 32, SMALL.non_embedding_parameters() - (2 * 4 + 1) * 32
    assert device_memory.parameters_per_device(SMALL, 1, 1) == SMALL.parameters()
    assert device_memory.parameters_per_device(SMALL, 2, 1) == norms + matrices // 2 + 2 * 100 // 2 * 32


def test_the_fullest_pipeline_stage_counts() -> None:
    inner = SMALL.non_embedding_parameters() - 32
    assert device_memory.parameters_per_device(SMALL, 1, 2) == inner // 2 + 32 + 99 * 32
    tied = SMALL.replace(tie_word_embeddings=True)
    assert device_memory.parameters_per_device(tied, 1, 2) == inner // 2 + 32 + 99 * 32


def test_bytes_follow_precision_and_the_distributed_optimizer() -> None:
    training = compose(["distil.precision=bf16"]).distil
    count = SMALL.parameters()
    sizes = device_memory.bytes_per_device(SMALL, SMALL, ranks(data=2), training)
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    state = ("teacher_weights", "student_weights", "student_gradients", "optimizer", "projections")
    assert [sizes[name] / count for name in state] == [2, 2, 4, 12, 0]
    training.distributed_optimizer = True
    assert device_memory.bytes_per_device(SMALL, SMALL, ranks(data=2), training)["optimizer"] == 6 * count
    fp32 = device_memory.bytes_per_device(SMALL, SMALL, ranks(), compose([]).distil)
    assert [fp32[name] / count for name in state] == [4, 4, 4, 8, 0]


def test_the_recipes_speed_and_what_the_teacher_adds() -> None:
    figures = planning.plan(compose(["experiment=llama31_8b_to_4b_width"]))
    found = figures["prediction"]
    assert found["tokens_per_second_per_device"] == pytest.approx(8190, abs=2)
    assert found["device_hours"] == pytest.approx(figures["flops"] / (0.4 * 989e12) / 3600, abs=0.01)
    assert found["hours"] == pytest.approx(found["device_hours"] / 256, abs=0.01)
    assert figures["teacher_adds"]["without_attention"] == pytest.approx(0.61, abs=0.005)
    assert figures["teacher_adds"]["with_attention"] == pytest.approx(0.55, abs=0.005)
    blackwell = planning.plan(compose(["experiment=llama31_8b_to_4b_width", "plan.gpu=B200"]))["prediction"]
    assert blackwell["device_hours"] == pytest.approx(found["device_hours"] * 989e12 / 2.25e15, abs=0.01)


def test_recompute_is_one_more_forward_of_the_students_layers_and_in_no_published_count() -> None:
    given = ["experiment=llama31_8b_to_4b_width", "distil.recompute="]
    without, with_it = (planning.plan(compose([*given[:1], given[1] + on])) for on in ("false", "true"))
    assert without["flops_per_token_executed"] == without["flops_per_token"] == with_it["flops_per_token"]
    layers = 2 * (3_724_741_632 - (2 * 32 + 1) * 3072)  # all but the norms
    attention = 2 * 8192 * 32 * 128 * 32
    assert with_it["flops_per_token_executed"] - with_it["flops_per_token"] == layers + attention
    speeds = with_it["prediction"]["executed"], with_it["prediction"]
    assert speeds[0]["tokens_per_second_per_device"] < speeds[1]["tokens_per_second_per_device"]
    assert without["prediction"]["executed"]["device_hours"] == without["prediction"]["device_hours"]


def test_a_teacher_that_is_not_asked_costs_nothing() -> None:
    teacher, student, length = SMALL, SMALL.replace(hidden_size=24), 10
    alone = planning.distillation_flops(teacher, student, length, follows_logits=False)
    assert alone.teacher == 0 and alone.attention == 3 * planning.attention_flops(student, length)
    loss = FeatureLoss(4, 4, "mse", 1.0)
    followed = planning.distillation_flops(teacher, student, length, [loss], follows_logits=False)
    assert followed.teacher == 2 * (planning.matrix_parameters(teacher) - 99 * 32), "all but its head"
    figures = planning.plan(compose(["experiment=quickstart_ce"]))
    assert figures["flops_per_token_parts"]["teacher"] == 0


WIDE, NARROW = SMALL, SMALL.replace(hidden_size=24, num_attention_heads=2)
LOSSES = {  # FLOPs per token over sequences of 10, weights of projections
    "full": (FeatureLoss(1, 1, "mse", 1.0), 6 * 24 * 32, 24 * 32),
    "low_rank": (FeatureLoss(1, 1, "cosine", 1.0, rank=4), 6 * 4 * (24 + 32), 4 * (24 + 32)),
    "relational": (FeatureLoss(1, 1, "relational", 1.0), 2 * 10 * (2 * 24 + 32), 0),
    "attention": (FeatureLoss(1, 1, "kl", 1.0, heads="mean"), 10 * (3 * 2 * 12 + 4 * 12), 0),
}


@pytest.mark.parametrize(("loss", "flops", "weights"), LOSSES.values(), ids=LOSSES)
def test_losses_beside_the_logits_are_counted(loss: FeatureLoss, flops: int, weights: int) -> None:
    plain, found = (
        planning.distillation_flops(WIDE, NARROW, 10, losses, ranks=ranks(tensor=2)) for losses in ([], [loss])
    )
    assert found.signals == found.total - plain.total == flops
    assert found.replicated == (0 if loss.heads else flops), "each tensor-parallel device has whole hidden states"
    split = ranks(tensor=2, sequence_parallel=True)
    assert planning.distillation_flops(WIDE, NARROW, 10, [loss], ranks=split).replicated == 0
    training = compose(["distil.precision=bf16"]).distil
    sizes = device_memory.bytes_per_device(WIDE, NARROW, ranks(tensor=2, data=2), training, [loss])
    assert sizes["projections"] == 18 * weights and sizes["signals"] > 0
    training.distributed_optimizer = True
    sizes = device_memory.bytes_per_device(WIDE, NARROW, ranks(tensor=2, data=2), training, [loss, loss])
    assert sizes["projections"] == 2 * 12 * weights
    assert device_memory.projections_per_device(WIDE, NARROW, 2, [loss, replace(loss, student_layer=4)]) == weights


def test_equal_widths_need_no_projection() -> None:
    assert device_memory.projections_per_device(WIDE, WIDE, 1, [FeatureLoss(1, 1, "mse", 1.0)]) == 0


def activations(shape: ModelShape, layout: Layout, *overrides: str) -> dict[str, int]:
    batch = ["distil.micro_batch_size=2", "distil.global_batch_size=16", "distil.sequence_length=10"]
    training = compose(["distil.precision=bf16", *batch, *overrides]).distil
    return activation_bytes(shape, shape, replace(layout, device="cuda"), training)


def test_a_layer_keeps_what_korthikanti_counts() -> None:
    """arXiv 2205.05198, table 2, for GPT's widths: without the two dropout masks and the part of attention's scores."""
    gpt = ModelShape(99, 48, 128, 4, 4, 4, 12)  # SwiGLU's 3 * 128 numbers are the 8 * 48 of GPT's MLP
    layers, tokens, hidden = 4, 20, 48
    sbh = layers * tokens * hidden
    assert activations(gpt, ranks())["activations"] == (34 - 2) * sbh
    assert activations(gpt, ranks(tensor=2))["activations"] == (10 - 2 + 24 / 2) * sbh
    assert activations(gpt, ranks(tensor=2, sequence_parallel=True))["activations"] == (34 - 2) / 2 * sbh
    recomputed = activations(gpt, ranks(), "distil.recompute=true")["activations"]
    assert recomputed == 2 * sbh + 32 * tokens * hidden, "the inputs, and one layer at a time"
    # 1F1B: the first stage of two waits with two micro batches, or with the only one.
    assert activations(gpt, ranks(pipeline=2))["activations"] == (34 - 2) * sbh
    few = activations(gpt, ranks(pipeline=2), "distil.global_batch_size=2")
    assert few["activations"] == (34 - 2) * sbh / 2


def test_a_chunk_of_logits_is_as_large_as_the_loss_makes_it() -> None:
    from pipelines.core import linear_divergence

    assert CHUNK_BYTES["cuda"] == linear_divergence.CHUNK_BYTES_ELSEWHERE
    assert ({"cpu": CHUNK_BYTES["cpu"]}, CHUNK_TOKENS) == (
        linear_divergence.CHUNK_BYTES,
        linear_divergence.CHUNK_TOKENS,
    )
    shape = ModelShape(128_256, 3072, 9216, 1, 32, 8, 128)
    few = activations(shape, ranks(tensor=8))["loss"]
    assert few == 20 * (2 * (3 * 3072 + 3072) + (4 + 4 + 2) * 16_032), "20 tokens are one chunk"
    many = activations(shape, ranks(tensor=8), "distil.sequence_length=8192")["loss"]
    assert many - 2 * 8192 * 2 * 4 * 3072 == pytest.approx(2.5 * CHUNK_BYTES["cuda"], rel=1e-2)


def test_the_teacher_has_bytes_of_its_own_precision() -> None:
    count = SMALL.parameters()
    for settings, weight in (([], 4), (["distil.precision=bf16"], 2), (["distil.teacher_precision=bf16"], 2)):
        assert device_memory.teacher_bytes(SMALL, ranks(), compose(settings).distil) == weight * count
    mixed = compose(["distil.precision=bf16", "distil.teacher_precision=fp32"]).distil
    assert device_memory.bytes_per_device(SMALL, SMALL, ranks(), mixed)["teacher_weights"] == 4 * count


def test_an_offloaded_teacher_has_two_layers_on_the_device() -> None:
    training = compose(["distil.teacher_precision=bf16", "distil.teacher_offload=true"]).distil
    layer = (SMALL.non_embedding_parameters() - 32) // 4
    assert device_memory.teacher_bytes(SMALL, ranks(), training) == 2 * (2 * layer + 32 + 2 * 99 * 32)


def test_a_teacher_in_fp8_has_a_byte_for_each_weight_of_its_layers_matrices() -> None:
    training = compose(["distil.teacher_precision=fp8"]).distil
    norms = 2 * 4 * 32
    matrices = SMALL.non_embedding_parameters() - norms - 32
    assert device_memory.teacher_bytes(SMALL, ranks(), training) == matrices + 2 * (norms + 32 + 2 * 99 * 32)


def test_the_target_keeps_what_is_not_given_and_head_dim() -> None:
    target = planning.target_shape(SMALL, StudentConfig(hidden_size=16, num_attention_heads=2))
    assert target == SMALL.replace(hidden_size=16, num_attention_heads=2)
    assert planning.target_shape(SMALL, StudentConfig(drop_layers=[2, 3])).num_hidden_layers == 2


def test_a_number_of_layers_that_contradicts_the_dropped_ones_is_refused() -> None:
    with pytest.raises(UserError, match="expected 2, what student.drop_layers leaves of 4"):
        planning.target_shape(SMALL, StudentConfig(drop_layers=[2, 3], num_hidden_layers=3))


def test_head_dim_follows_from_heads_where_it_is_not_given() -> None:
    config = compose(["model.shape.head_dim=null", "model.shape.hidden_size=320", "model.shape.num_attention_heads=8"])
    assert planning.shape_from_config(config.model.shape).head_dim == 40


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("h100", 989e12),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(name: str, expected: float | None) -> None:
    assert gpus.peak_flops(name) == expected
