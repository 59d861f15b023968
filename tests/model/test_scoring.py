"""Scores are the same at every layout, equal the formula on transformers' activations, and ModelOpt's."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipelines.families import ModelShape
from tests.model.teachers import random_weights, sample_rows, write_teacher
from tests.ranks import RankPool

SHAPE = ModelShape(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=6,
)
SCORES = "tests.model.cases_scoring:scores"
ARRAYS = ("hidden", "ffn", "heads", "kv_groups", "block_influence")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher") / "hf", SHAPE, random_weights(SHAPE))


@pytest.fixture(scope="module")
def single(ranks, teacher):
    return ranks(1, SCORES, directory=str(teacher))[0]


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"tensor": 2}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {}),
        (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
        (4, {"tensor": 2}),
        (1, {"micro_batch_size": 7}),
    ],
    ids=["tp2", "tp2-sp", "pp2", "dp2", "tp2-sp-pp2", "tp2-dp2", "one-batch"],
)
def test_every_rank_of_every_layout_has_the_scores_of_one_process(ranks, teacher, single, world, layout):
    results = ranks(world, SCORES, directory=str(teacher), **layout)
    for result in results:
        assert (result["samples"], result["tokens"]) == (single["samples"], single["tokens"])
        for name in ARRAYS:
            np.testing.assert_allclose(result[name], single[name], rtol=2e-5, err_msg=name)
            np.testing.assert_array_equal(result[name], results[0][name])


@pytest.mark.parametrize(
    ("over_sequence", "over_samples"), [("max", "mean"), ("l2", "max"), ("l1", "l1"), ("mean", "max"), ("max", "l2")]
)
def test_aggregations_are_those_of_one_process_at_every_layout(ranks, teacher, over_sequence, over_samples):
    arguments = {"directory": str(teacher), "sequence_aggregation": over_sequence, "sample_aggregation": over_samples}
    expected = ranks(1, SCORES, **arguments)[0]
    for layout in ({"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {}):
        for result in ranks(2, SCORES, **arguments, **layout):
            for name in ARRAYS:
                np.testing.assert_allclose(result[name], expected[name], rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def seen(teacher):
    """{(place, layer index): (samples, sequence, channels)} float64 activations of transformers' modules."""
    return activations(teacher)


OVER = {
    "mean": lambda values: values.abs().mean(0),
    "l1": lambda values: values.abs().sum(0),
    "l2": lambda values: values.norm(dim=0),
    "max": lambda values: values.abs().amax(0),
}


@pytest.mark.parametrize("over_samples", OVER)
@pytest.mark.parametrize("over_sequence", OVER)
def test_every_aggregation_is_its_formula_on_the_activations_of_transformers(
    ranks, teacher, seen, over_sequence, over_samples
):
    _, mask = sample_rows(SHAPE.vocab_size, 7, 12)

    def joined(values):
        each = [OVER[over_sequence](a[m]) for a, m in zip(values, mask > 0, strict=True) if m.any()]
        return OVER[over_samples](torch.stack(each))

    arguments = {"sequence_aggregation": over_sequence, "sample_aggregation": over_samples}
    result = ranks(1, SCORES, directory=str(teacher), **arguments)[0]
    for name, values in by_formula(seen, joined).items():
        np.testing.assert_allclose(result[name], values.numpy(), rtol=2e-5, err_msg=name)


def by_formula(seen, norm) -> dict[str, torch.Tensor]:
    """norm: of one place's channels, over its activations."""
    layers = range(SHAPE.num_hidden_layers)
    return {
        "hidden": sum(norm(seen[f"norm {n}", i]) for i in layers for n in (1, 2)),
        "ffn": torch.stack([norm(seen["ffn", i]) for i in layers]),
        "heads": torch.stack([norm(seen["heads", i]).view(-1, SHAPE.head_dim).norm(dim=1) for i in layers]),
        "kv_groups": torch.stack(
            [norm(seen["heads", i]).view(SHAPE.num_key_value_heads, -1).norm(dim=1) for i in layers]
        ),
    }


def activations(teacher) -> dict[tuple[str, int], torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher).double()
    tokens, _ = sample_rows(SHAPE.vocab_size, 7, 12)
    seen: dict[tuple[str, int], torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        places = {
            "norm 1": layer.input_layernorm,
            "norm 2": layer.post_attention_layernorm,
            "heads": layer.self_attn.o_proj,
            "ffn": layer.mlp.down_proj,
            "layer": layer,
        }
        for name, module in places.items():

            def keep(module, inputs, output, name=name, index=index):
                output = output[0] if isinstance(output, tuple) else output
                seen[name, index] = output if name.startswith("norm") else inputs[0]
                seen[name + " out", index] = output

            module.register_forward_hook(keep)
    with torch.no_grad():
        model(tokens)
    return seen


def test_scores_are_the_formula_on_the_activations_of_transformers(seen, single):
    _, mask = sample_rows(SHAPE.vocab_size, 7, 12)
    mask = mask > 0

    def norm(activations):
        means = [a[m].abs().mean(0) for a, m in zip(activations, mask, strict=True) if m.any()]
        return torch.stack(means).norm(dim=0)

    layers = range(SHAPE.num_hidden_layers)
    expected = by_formula(seen, norm) | {
        "block_influence": torch.stack(
            [1 - F.cosine_similarity(seen["layer", i][mask], seen["layer out", i][mask], dim=-1).mean() for i in layers]
        ),
    }
    assert single["samples"] == 6
    assert single["tokens"] == int(mask.sum())
    for name in ARRAYS:
        np.testing.assert_allclose(single[name], expected[name].numpy(), rtol=2e-5, err_msg=name)


def test_bfloat16_weights_are_scored(ranks, teacher, single):
    result = ranks(2, SCORES, directory=str(teacher), tensor=2, sequence_parallel=True, precision="bf16")[0]
    for name in ARRAYS:
        np.testing.assert_allclose(result[name], single[name], rtol=0.1, err_msg=name)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_activations_that_are_not_finite_name_the_layer_on_every_rank(ranks, tmp_path, layout):
    weights = random_weights(SHAPE)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    directory = write_teacher(tmp_path / "hf", SHAPE, weights)
    errors = ranks(2, "tests.model.cases_scoring:error_of", directory=str(directory), **layout)
    for error in errors:
        assert "found NaN or infinity in layer 3 (from 1), first in the MLP's neurons" in error


@pytest.fixture(scope="module")
def modelopt(tmp_path_factory):
    """A call on a rank of its own, on a teacher whose sizes ModelOpt takes."""
    shape = SHAPE.replace(hidden_size=128, intermediate_size=192, head_dim=16)
    directory = write_teacher(tmp_path_factory.mktemp("modelopt") / "hf", shape, random_weights(shape))
    arguments = {"directory": str(directory), "samples": 12, "length": 16, "micro_batch_size": 3}
    pool = RankPool(1)
    yield lambda case, **more: pool(f"tests.model.cases_modelopt:{case}", arguments | more, timeout=300)[0]
    pool.close()


@pytest.mark.slow
def test_scores_equal_those_of_modelopt(modelopt):
    """But for those of KV groups, whose heads ModelOpt reads in another order than that in which they lie."""
    result = modelopt("both")
    for name in (name for name in ARRAYS if name != "kv_groups"):
        np.testing.assert_allclose(result["ours"][name], result["modelopt"][name], rtol=2e-5, err_msg=name)
        assert (np.argsort(result["ours"][name]) == np.argsort(result["modelopt"][name])).all(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "ffn_hidden_size": 64},
        {"hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2},
    ],
    ids=["hidden-ffn", "hidden-ffn-heads"],
)
def test_pruned_weights_are_those_of_modelopt(modelopt, tmp_path, sizes):
    same = modelopt("pruned_weights", student=str(tmp_path / "student"), sizes=sizes)
    assert all(same.values()), [name for name, equal in same.items() if not equal]
