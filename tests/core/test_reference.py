"""The oracle itself: its forward against transformers, its loss against torch's own functions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipelines.core.reference import distillation_step, llama_logits
from pipelines.families import ModelShape

SHAPE = ModelShape(
    vocab_size=31,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-3,
    rope_theta=500.0,
)
ROPES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def random_tensors(shape: ModelShape, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.5 * torch.randn(size, generator=generator, dtype=torch.float64) + (len(size) == 1)
        for name, size in shape.tensor_shapes().items()
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_logits_equal_transformers(rope: dict[str, Any] | None, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPE.replace(rope_scaling=rope, tie_word_embeddings=tied, max_position_embeddings=512)
    tensors = random_tensors(shape, seed=1)
    config = {k: v for k, v in shape.to_hugging_face().items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).double().eval()
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    model.tie_weights()
    tokens = torch.randint(0, shape.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(tokens).logits
    found = llama_logits(tensors, shape, tokens)
    # transformers' RMSNorm and rope tables are fp32 whatever the model's dtype.
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


def test_documents_of_a_row_are_as_if_they_were_alone() -> None:
    shape = SHAPE.replace(rope_scaling=ROPES["llama3"])
    tensors = random_tensors(shape, seed=1)
    tokens = torch.randint(1, shape.vocab_size, (2, 11), generator=torch.Generator().manual_seed(2))
    tokens[0, [3, 4]] = tokens[1, 10] = 0
    found = llama_logits(tensors, shape, tokens, end_of_document=0)
    for row, start, stop in ((0, 0, 4), (0, 4, 5), (0, 5, 11), (1, 0, 11)):
        alone = llama_logits(tensors, shape, tokens[row : row + 1, start:stop])[0]
        assert torch.allclose(found[row, start:stop], alone, rtol=0, atol=1e-12)
    assert not torch.allclose(found[0, 5:], llama_logits(tensors, shape, tokens)[0, 5:], atol=1e-3)


def test_loss_and_gradients() -> None:
    student_shape = SHAPE.replace(hidden_size=12)
    student, teacher = random_tensors(student_shape, 3), random_tensors(SHAPE, 4)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, SHAPE.vocab_size, (3, 9), generator=generator)
    mask = (torch.rand(3, 8, generator=generator) < 0.6).float()
    step = distillation_step(
        student,
        student_shape,
        teacher,
        SHAPE,
        ids[:, :-1],
        ids[:, 1:],
        mask,
        kd_weight=0.7,
        ce_weight=0.2,
        temperature=3.0,
    )

    def loss(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        valid = mask.bool()
        s, t = (
            llama_logits(tensors, student_shape, ids[:, :-1])[valid],
            llama_logits(teacher, SHAPE, ids[:, :-1])[valid],
        )
        kl = F.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean")
        return 0.7 * 9 * kl + 0.2 * F.cross_entropy(s, ids[:, 1:][valid])

    assert step.means["loss"] == pytest.approx(loss(student).item(), rel=1e-12)
    assert step.means["tokens"] == mask.sum().item()
    assert step.means["loss"] == pytest.approx(0.7 * 9 * step.means["kd"] + 0.2 * step.means["ce"], rel=1e-12)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"):
        direction = torch.randn(student[name].shape, generator=generator, dtype=torch.float64)
        ahead, behind = (loss(student | {name: student[name] + h * direction}) for h in (1e-5, -1e-5))
        slope = (step.gradients[name] * direction).sum().item()
        assert slope == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-6)


def test_refuses_unknown_rope() -> None:
    with pytest.raises(ValueError, match="yarn"):
        llama_logits(
            random_tensors(SHAPE, 0),
            SHAPE.replace(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
            torch.zeros(1, 2).long(),
        )
