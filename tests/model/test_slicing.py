"""Students are exactly the kept part of their teachers, on disk and in transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config import UserError
from pipelines.core.selection import Kept
from pipelines.families import HEAD, ModelShape, read_shape
from pipelines.model.slicing import slice_checkpoint, sliced_shape
from tests.core.memory import peak_resident_bytes
from tests.model.teachers import random_case, random_weights, silence, write_teacher

SHAPE = ModelShape(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=5,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
KEPT = Kept(
    hidden=[0, 2, 3, 5],
    ffn={1: [1, 4], 3: [0, 3]},
    heads={1: [0, 3], 3: [1, 2]},
    layers=[1, 3],
    groups={1: [0, 1], 3: [0, 1]},
)


def logits(directory, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).double()(tokens).logits


@pytest.mark.parametrize("seed", range(6))
def test_a_teacher_whose_other_parts_do_nothing_is_pruned_to_exactly_its_function(tmp_path, seed):
    shape, kept = random_case(seed)
    weights = random_weights(shape, seed)
    silence(weights, shape, kept)
    teacher = write_teacher(tmp_path / "teacher", shape, weights)
    tokens = torch.randint(0, shape.vocab_size, (6, 24), generator=torch.Generator().manual_seed(seed))
    slice_checkpoint(teacher, tmp_path / "student", shape, kept)
    expected = logits(teacher, tokens)
    assert expected.std() > 0.1
    assert (logits(tmp_path / "student", tokens) - expected).norm() < 1e-5 * expected.norm()


def test_every_tensor_is_the_kept_part_of_the_teachers(tmp_path):
    weights = random_weights(SHAPE)
    teacher = write_teacher(tmp_path / "teacher", SHAPE, weights)
    student = slice_checkpoint(teacher, tmp_path / "student", SHAPE, KEPT)
    assert student == SHAPE.replace(hidden_size=4, intermediate_size=2, num_attention_heads=2, num_hidden_layers=2)
    written = load_file(tmp_path / "student" / "model.safetensors")
    assert {name: tuple(w.shape) for name, w in written.items()} == student.tensor_shapes()
    h = KEPT.hidden
    rows = [4, 5, 6, 7, 8, 9, 10, 11]  # heads 1 and 2 of 4 channels
    third = "model.layers.2"
    assert torch.equal(written["model.embed_tokens.weight"], weights["model.embed_tokens.weight"][:, h])
    assert torch.equal(written[HEAD], weights[HEAD][:, h])
    assert torch.equal(written["model.norm.weight"], weights["model.norm.weight"][h])
    for name, expected in {
        "input_layernorm": weights[f"{third}.input_layernorm.weight"][h],
        "self_attn.q_proj": weights[f"{third}.self_attn.q_proj.weight"][rows][:, h],
        "self_attn.k_proj": weights[f"{third}.self_attn.k_proj.weight"][:, h],
        "self_attn.v_proj": weights[f"{third}.self_attn.v_proj.weight"][:, h],
        "self_attn.o_proj": weights[f"{third}.self_attn.o_proj.weight"][h][:, rows],
        "mlp.gate_proj": weights[f"{third}.mlp.gate_proj.weight"][[0, 3]][:, h],
        "mlp.down_proj": weights[f"{third}.mlp.down_proj.weight"][h][:, [0, 3]],
    }.items():
        assert torch.equal(written[f"model.layers.1.{name}.weight"], expected), name


def test_a_dropped_kv_group_goes_with_its_heads_each_layer_by_its_own(tmp_path):
    weights = random_weights(SHAPE)
    teacher = write_teacher(tmp_path / "teacher", SHAPE, weights)
    kept = replace(KEPT, groups={1: [0], 3: [1]}, heads={1: [0, 1], 3: [2, 3]})
    student = slice_checkpoint(teacher, tmp_path / "student", SHAPE, kept)
    assert (student.num_key_value_heads, student.num_attention_heads, student.head_dim) == (1, 2, 4)
    written = load_file(tmp_path / "student" / "model.safetensors")
    for layer, number, groups, heads in ((0, 1, slice(0, 4), slice(0, 8)), (1, 3, slice(4, 8), slice(8, 16))):
        own, origin = (f"model.layers.{index}.self_attn" for index in (layer, number - 1))
        for name in ("k", "v"):
            expected = weights[f"{origin}.{name}_proj.weight"][groups][:, KEPT.hidden]
            assert torch.equal(written[f"{own}.{name}_proj.weight"], expected)
        assert torch.equal(written[f"{own}.q_proj.weight"], weights[f"{origin}.q_proj.weight"][heads][:, KEPT.hidden])
        assert torch.equal(written[f"{own}.o_proj.weight"], weights[f"{origin}.o_proj.weight"][KEPT.hidden][:, heads])
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"]) == (1, 4)


def test_config_names_head_dim_and_the_tokenizer_is_copied(tmp_path):
    teacher = write_teacher(tmp_path / "teacher", SHAPE, random_weights(SHAPE))
    (teacher / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (teacher / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    slice_checkpoint(teacher, tmp_path / "student", SHAPE, KEPT)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["head_dim"] == 4 != config["hidden_size"] // config["num_attention_heads"]
    assert read_shape(tmp_path / "student") == sliced_shape(SHAPE, KEPT)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    assert not (tmp_path / "student.partial").exists()


def test_dtype_stays_and_shards_are_as_small_as_asked(tmp_path):
    weights = {name: weight.bfloat16() for name, weight in random_weights(SHAPE).items()}
    teacher = write_teacher(tmp_path / "teacher", SHAPE, weights)
    counted: list[int] = []
    student = slice_checkpoint(teacher, tmp_path / "student", SHAPE, KEPT, max_shard_bytes=200, advance=counted.append)
    assert sum(counted) == student.parameters()
    files = sorted((tmp_path / "student").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: weight for file in files for name, weight in load_file(file).items()}
    assert torch.equal(written["model.embed_tokens.weight"], weights["model.embed_tokens.weight"][:, KEPT.hidden])
    assert json.loads((tmp_path / "student" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_memory_holds_a_tensor_and_its_cut_and_never_the_model(tmp_path):
    """Llama-3.1-8B at an eighth of its width, to the 4B: its embedding, the largest tensor, is a fifteenth of it."""
    shape = ModelShape(
        vocab_size=16_032,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=16,
    )
    weights = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in shape.tensor_shapes().items()}
    teacher = write_teacher(tmp_path / "teacher", shape, weights)
    del weights
    largest, layers = 2 * 16_032 * 512, range(1, 33)
    assert 2 * shape.parameters() > 15 * largest
    kept = Kept(
        hidden=[channel for channel in range(512) if channel % 4],
        ffn={n: list(range(n, n + 1152)) for n in layers},
        heads={n: list(range(32)) for n in layers},
        layers=list(layers),
        groups={n: list(range(8)) for n in layers},
    )
    assert peak_resident_bytes(lambda: slice_checkpoint(teacher, tmp_path / "student", shape, kept)) < 3 * largest


def test_a_teacher_of_another_shape_than_its_config_leaves_nothing_behind(tmp_path):
    weights = random_weights(SHAPE)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 6)
    teacher = write_teacher(tmp_path / "teacher", SHAPE, weights)
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj.weight: expected \[5, 6\], found \[4, 6\]"):
        slice_checkpoint(teacher, tmp_path / "student", SHAPE, KEPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]
