"""Taylor scores are the derivative of each sample's loss by a factor on the unit, at every layout."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.model.teachers import random_weights, sample_rows, write_teacher
from tests.model.test_scoring import SCORES, SHAPE

ARRAYS = ("hidden", "ffn", "heads", "kv_groups", "taylor_layers", "block_influence")
LAYOUTS = {
    "single": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2-sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "tp2-sp-pp2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "tp2-sp-dp2": (4, {"tensor": 2, "sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    shape = SHAPE.replace(tie_word_embeddings=True)  # a head that the first stage has too
    return write_teacher(tmp_path_factory.mktemp("teacher") / "hf", shape, random_weights(shape))


@pytest.fixture(scope="module")
def derivatives(teacher):
    """{array: (samples, ...)} absolute derivatives by float64 autograd through factors of 1; transformers' modules."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").double().requires_grad_(False)
    config, count = model.config, SHAPE.num_hidden_layers
    factors = {
        "hidden": torch.ones(config.hidden_size, dtype=torch.float64, requires_grad=True),
        "ffn": torch.ones(count, config.intermediate_size, dtype=torch.float64, requires_grad=True),
        "heads": torch.ones(count, config.num_attention_heads, dtype=torch.float64, requires_grad=True),
        "taylor_layers": torch.ones(count, dtype=torch.float64, requires_grad=True),
    }

    def norm(module, inputs, output):  # transformers' own computes in fp32
        x = inputs[0]
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * module.weight * factors["hidden"]

    for index, layer in enumerate(model.model.layers):

        def heads(module, inputs, index=index):
            each = inputs[0].unflatten(-1, (-1, SHAPE.head_dim))
            return ((each * factors["heads"][index].unsqueeze(-1)).flatten(-2),)

        def ffn(module, inputs, index=index):
            return (inputs[0] * factors["ffn"][index],)

        def whole(module, inputs, output, index=index):
            out = output[0] if isinstance(output, tuple) else output
            out = inputs[0] + factors["taylor_layers"][index] * (out - inputs[0])
            return (out, *output[1:]) if isinstance(output, tuple) else out

        layer.self_attn.o_proj.register_forward_pre_hook(heads)
        layer.mlp.down_proj.register_forward_pre_hook(ffn)
        layer.register_forward_hook(whole)
        for module in (layer.input_layernorm, layer.post_attention_layernorm):
            module.register_forward_hook(norm)
    model.model.norm.register_forward_hook(norm)
    tokens, mask = sample_rows(SHAPE.vocab_size, 7, 12)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*factors, "kv_groups")}
    for row, kept in zip(tokens, mask > 0, strict=True):
        if not kept.any():
            continue
        loss = F.cross_entropy(model(row.unsqueeze(0)).logits[0][kept], row[kept])
        for (name, _), gradient in zip(factors.items(), torch.autograd.grad(loss, factors.values()), strict=True):
            found[name].append(gradient.abs())
            if name == "heads":
                found["kv_groups"].append(gradient.view(count, SHAPE.num_key_value_heads, -1).sum(-1).abs())
    return {name: torch.stack(values) for name, values in found.items()}


def expect_close(found, expected, name, tolerance=2e-5):
    """Sums of either sign: small next to the array's greatest."""
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * expected.max(), err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_of_every_layout_are_the_derivatives_of_the_loss(ranks, teacher, derivatives, layout):
    world, settings = LAYOUTS[layout]
    results = ranks(world, SCORES, directory=str(teacher), taylor=True, **settings)
    activation = ranks(1, SCORES, directory=str(teacher))[0]
    for result in results:
        assert result["samples"] == 6
        for name, each in derivatives.items():
            expect_close(result[name], each.norm(dim=0).numpy(), name)
        np.testing.assert_allclose(result["block_influence"], activation["block_influence"], rtol=2e-5)
        for name in ARRAYS:
            np.testing.assert_array_equal(result[name], results[0][name])


@pytest.mark.parametrize("word", ["mean", "l1", "max"])
def test_samples_are_aggregated_as_asked(ranks, teacher, derivatives, word):
    arguments = {"directory": str(teacher), "taylor": True, "sample_aggregation": word}
    join = {"mean": lambda v: v.mean(0), "l1": lambda v: v.sum(0), "max": lambda v: v.amax(0)}[word]
    for settings in ({"tensor": 2, "sequence_parallel": True}, {}):
        result = ranks(2, SCORES, **arguments, **settings)[0]
        for name, each in derivatives.items():
            expect_close(result[name], join(each).numpy(), name)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}], ids=["tp2", "pp2", "dp2"])
def test_activations_that_are_not_finite_name_the_layer_on_every_rank(ranks, tmp_path, layout):
    weights = random_weights(SHAPE)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    directory = write_teacher(tmp_path / "hf", SHAPE, weights)
    for error in ranks(2, "tests.model.cases_scoring:error_of", directory=str(directory), taylor=True, **layout):
        assert "found NaN or infinity in layer 3 (from 1), first in the MLP's neurons" in error


def test_gradients_that_are_not_finite_are_told(ranks, tmp_path):
    weights = random_weights(SHAPE)
    weights["lm_head.weight"][3, 5] = float("inf")
    directory = write_teacher(tmp_path / "hf", SHAPE, weights)
    for error in ranks(2, "tests.model.cases_scoring:error_of", directory=str(directory), taylor=True, tensor=2):
        assert error.startswith("gradients: expected finite numbers")
