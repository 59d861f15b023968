"""Planning against the counts that were published for Llama-3.1-8B to 4B, and against counts taken another way."""

import pytest

from pipelines import planning
from pipelines.compose import compose
from pipelines.config import Layout, Precision, StudentConfig, UserError
from pipelines.families import ModelShape

SMALL = ModelShape(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)


def ranks(tensor: int = 1, pipeline: int = 1, data: int = 1) -> Layout:
    return Layout(tensor * pipeline * data, tensor, pipeline, 1, data, "cpu", False)


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
    assert planning.parameters_per_device(SMALL, 1, 1) == SMALL.parameters()
    assert planning.parameters_per_device(SMALL, 2, 1) == norms + matrices // 2 + 2 * 100 // 2 * 32


def test_the_fullest_pipeline_stage_counts() -> None:
    inner = SMALL.non_embedding_parameters() - 32
    assert planning.parameters_per_device(SMALL, 1, 2) == inner // 2 + 32 + 99 * 32
    tied = SMALL.replace(tie_word_embeddings=True)
    assert planning.parameters_per_device(tied, 1, 2) == inner // 2 + 32 + 99 * 32


def test_bytes_follow_precision_and_the_distributed_optimizer() -> None:
    training = compose(["distil.precision=bf16"]).distil
    count = SMALL.parameters()
    sizes = planning.bytes_per_device(SMALL, SMALL, ranks(data=2), training)
    assert sizes == {
        "teacher_weights": 2 * count,
        "student_weights": 2 * count,
        "student_gradients": 4 * count,
        "optimizer": 12 * count,
        "total": 20 * count,
    }
    training.distributed_optimizer = True
    assert planning.bytes_per_device(SMALL, SMALL, ranks(data=2), training)["optimizer"] == 6 * count
    fp32 = planning.bytes_per_device(SMALL, SMALL, ranks(), compose([]).distil)
    assert fp32["total"] == (4 + 4 + 4 + 8) * count


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
    assert planning.peak_flops(name) == expected
