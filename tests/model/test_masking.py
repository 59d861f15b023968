"""A masked teacher is its sliced student, at every layout, against the student's own directory in float64."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.core.selection import Kept
from pipelines.families import ModelShape
from pipelines.model.slicing import slice_checkpoint
from tests.model import cases_quality
from tests.model.teachers import random_weights, write_teacher

FOUND = "tests.model.cases_masking:logits_and_losses"
# An eps of the size of the activations' squares: what it is multiplied by can be seen.
UNTIED = ModelShape(51, 20, 28, 4, 8, 4, 6, rms_norm_eps=0.3)
TIED = UNTIED.replace(
    hidden_size=24, num_key_value_heads=2, tie_word_embeddings=True, architecture="MistralForCausalLM"
)
LAYOUTS = [
    (1, {}),
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2}),
    (2, {}),
    (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
]
NAMES = ["tp1", "tp2", "tp2-sp", "pp2", "dp2", "tp2-sp-pp2"]


def students(shape: ModelShape, seed: int = 3) -> dict[str, Kept]:
    """What stays: one axis alone, a pipeline stage without layers, everything together."""
    draw = random.Random(seed)
    layers = list(range(1, shape.num_hidden_layers + 1))
    per_group = shape.num_attention_heads // shape.num_key_value_heads

    def some(size: int, keep: int) -> list[int]:
        return sorted(draw.sample(range(size), keep))

    def heads() -> list[int]:
        return [g * per_group + h for g in range(shape.num_key_value_heads) for h in some(per_group, per_group // 2)]

    whole = Kept(
        hidden=list(range(shape.hidden_size)),
        ffn={n: list(range(shape.intermediate_size)) for n in layers},
        heads={n: list(range(shape.num_attention_heads)) for n in layers},
        layers=layers,
        groups={n: list(range(shape.num_key_value_heads)) for n in layers},
    )
    hidden = some(shape.hidden_size, 13)
    ffn, fewer_heads = {n: some(shape.intermediate_size, 11) for n in layers}, {n: heads() for n in layers}
    groups = {n: some(shape.num_key_value_heads, shape.num_key_value_heads // 2) for n in layers}

    def heads_of(groups: dict[int, list[int]]) -> dict[int, list[int]]:
        return {n: [g * per_group + h for g in kept for h in range(per_group)] for n, kept in groups.items()}

    return {
        "whole": whole,
        "hidden": replace(whole, hidden=hidden),
        "ffn": replace(whole, ffn=ffn),
        "heads": replace(whole, heads=fewer_heads),
        "depth": replace(whole, layers=[1, 4]),
        "first stage alone": replace(whole, layers=[1, 2]),
        "second stage alone": replace(whole, layers=[3]),
        "kv groups": replace(whole, groups=groups, heads=heads_of(groups)),
        "width": Kept(hidden, ffn, fewer_heads, layers, whole.groups),
        "both": Kept(hidden, ffn, heads_of(groups), [2, 3], groups),
    }


@pytest.fixture(scope="module", params=[UNTIED, TIED], ids=["untied", "tied"])
def teacher(request, tmp_path_factory):
    """The teacher, and of each of its students the sliced directory, transformers' logits and its loss in float64."""
    root, shape = tmp_path_factory.mktemp("masking"), request.param
    directory = write_teacher(root / "teacher", shape, random_weights(shape))
    expected = {}
    for name, kept in students(shape).items():
        slice_checkpoint(directory, root / name, shape, kept)
        expected[name] = root / name, *oracle(root / name)
    return directory, students(shape), expected


def oracle(directory: Path) -> tuple[np.ndarray, float]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).double().eval()
    windows, mask = cases_quality.rows(model.config.vocab_size, 5, 12)
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    picked = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])[..., 0]
    return logits[:2].numpy(), -picked[mask.bool()].mean().item()


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=NAMES)
def test_a_masked_teacher_is_its_sliced_student(ranks, teacher, world, layout):
    directory, kept, expected = teacher
    for found in ranks(world, FOUND, directory=str(directory), students=list(kept.values()), **layout):
        for name, (logits, loss) in zip(kept, found, strict=True):
            _, wanted, wanted_loss = expected[name]
            np.testing.assert_allclose(logits, wanted, atol=2e-5 * np.abs(wanted).max(), err_msg=name)
            assert loss == pytest.approx(wanted_loss, rel=1e-5), name
    assert len({round(float(loss), 4) for _, _, loss in expected.values()}) == len(expected)


def test_the_student_read_from_its_directory_agrees(ranks, teacher):
    directory, kept, expected = teacher
    ((_, *found, both),) = ranks(1, FOUND, directory=str(directory), students=list(kept.values()))
    assert found
    own = ranks(1, "tests.model.cases_masking:student_logits", directory=str(expected["both"][0]))[0]
    np.testing.assert_allclose(both[0], own, atol=1e-5 * np.abs(own).max())


def test_a_teacher_in_bf16_is_its_student_within_the_rounding(ranks, teacher):
    directory, kept, expected = teacher
    losses = ranks(1, "tests.model.cases_masking:bf16_losses", directory=str(directory), students=list(kept.values()))[
        0
    ]
    for name, loss in zip(kept, losses, strict=True):
        assert loss == pytest.approx(expected[name][2], rel=0.02), name
