"""Values and gradients of the sharded loss against plain float64 at TP 1, 2 and 4."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipelines.core import chunk as plain
from pipelines.core import reference
from pipelines.core.divergence import greatest, token_terms
from pipelines.core.family import FAMILY, divergence_named
from pipelines.core.loss import LossWeights, distillation_terms, loss_identity, masked_sum, valid_tokens
from pipelines.core.vocab_parallel import Shard
from tests.ranks import RankPools

TERMS = "tests.core.cases_divergence:sharded_terms"
TOKENS, VOCABULARY = 12, 37

# Where each rank's columns start; unequal, and in the last case a rank whose shard is all padding.
SHARDS = {
    "tp1": (1, [0], 37),
    "tp2": (2, [0, 11], 37),
    "tp2_padded": (2, [0, 20], 33),
    "tp4": (4, [0, 5, 6, 30], 37),
    "tp4_one_all_padding": (4, [0, 10, 20, 30], 29),
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "kd": {"kd": 1.0, "ce": 0.0},
    "kd_and_ce": {"kd": 0.7, "ce": 0.3},
    "kd_and_ce_hot": {"kd": 0.7, "ce": 0.3, "temperature": 2.5},
    "kd_hot_without_square": {"kd": 1.0, "ce": 0.0, "temperature": 3.0, "temperature_squared": False},
    "ce": {"kd": 0.0, "ce": 1.0},
}


def logits(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher: (TOKENS, VOCABULARY), far from uniform, with an offset, agreeing on some tokens; labels below
    29, two of them -100."""
    generator = torch.Generator().manual_seed(seed)
    student, noise = torch.randn(2, TOKENS, VOCABULARY, generator=generator)
    student, teacher = (5 * torch.stack([student, student + 0.6 * noise]) + 40).to(dtype).unbind()
    labels = torch.randint(0, 29, (TOKENS,), generator=generator)
    labels[[2, 7]] = -100
    return student, teacher, labels


def oracle(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    upstream: torch.Tensor,
    *,
    kd: float,
    ce: float,
    temperature: float = 1.0,
    temperature_squared: bool = True,
    divergence: tuple[Any, ...] = ("forward_kl",),
    top_k: int | None = None,
) -> dict[str, torch.Tensor]:
    s = student.double().requires_grad_()
    valid_s, valid_t = s[:, :vocab_size], teacher.double()[:, :vocab_size]
    name, parameter = (*divergence, None)[:2]
    distance = reference.divergences(valid_t / temperature, valid_s / temperature, name, parameter, top_k)
    cross_entropy = F.cross_entropy(valid_s, labels, reduction="none", ignore_index=-100)
    loss = kd * (temperature**2 if temperature_squared else 1) * distance + ce * cross_entropy
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), s)
    agreement = (valid_s.argmax(1) == valid_t.argmax(1)).double()
    return {"loss": loss, "kd": distance, "ce": cross_entropy, "agreement": agreement, "gradient": gradient}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0, "a vacuous comparison"
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_values_and_gradients(
    ranks: RankPools, world: int, starts: list[int], vocab_size: int, weights: dict[str, Any]
) -> None:
    student, teacher, labels = logits(seed=world)
    upstream = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) - 0.3
    upstream[4] = 0
    expected = oracle(student, teacher, labels, vocab_size, upstream, **weights)
    found = ranks(
        world,
        TERMS,
        student=student,
        teacher=teacher if weights["kd"] else None,
        labels=labels if weights["ce"] else None,
        vocab_size=vocab_size,
        starts=starts,
        weights=weights,
        upstream=upstream,
    )
    for rank, result in enumerate(found):
        for name, term in result["terms"].items():
            wanted = {"kd": weights["kd"], "ce": weights["ce"], "agreement": weights["kd"]}.get(name, 1)
            assert (term is not None) == bool(wanted), f"{name}: a weight of 0 skips its work"
            if term is not None:
                assert relative(term, expected[name]) < 2e-6, f"{name} on rank {rank}"
                assert torch.equal(term, found[0]["terms"][name]), f"{name}: replicated bit for bit"
        assert result["backward_collectives"] == []
    assert relative(torch.cat([r["gradient"] for r in found], dim=1), expected["gradient"]) < 2e-6


@pytest.mark.parametrize(
    "divergence", [("reverse_kl",), ("jensen_shannon", 0.3), ("skew_kl", 0.2), ("total_variation",)], ids=lambda d: d[0]
)
@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_every_divergence(
    ranks: RankPools, world: int, starts: list[int], vocab_size: int, divergence: tuple[Any, ...]
) -> None:
    student, teacher, labels = logits(seed=10 + world)
    upstream = torch.rand(TOKENS, generator=torch.Generator().manual_seed(2)) - 0.3
    for weights in ({"kd": 1.0, "ce": 0.0}, {"kd": 0.7, "ce": 0.3, "temperature": 2.5}):
        for top_k in (None, 5):
            expected = oracle(
                student, teacher, labels, vocab_size, upstream, divergence=divergence, top_k=top_k, **weights
            )
            found = ranks(
                world,
                TERMS,
                student=student,
                teacher=teacher,
                labels=labels,
                vocab_size=vocab_size,
                starts=starts,
                weights=weights | {"top_k": top_k},
                upstream=upstream,
                divergence=divergence,
            )
            for result in found:
                for name in ("loss", "kd", "ce", "agreement"):
                    assert relative(result["terms"][name], expected[name]) < 3e-6, name
                    assert torch.equal(result["terms"][name], found[0]["terms"][name])
            assert relative(torch.cat([r["gradient"] for r in found], dim=1), expected["gradient"]) < 5e-6


@pytest.mark.parametrize("top_k", [1, 8, 28])
@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_top_k_with_the_rest_as_one_bucket(
    ranks: RankPools, world: int, starts: list[int], vocab_size: int, top_k: int
) -> None:
    """k = 28 of 29 ids leaves one in the tail, k = 8 is more than one of the ranks holds."""
    student, teacher, labels = logits(seed=20 + world)
    student[3, :vocab_size] += 60 * torch.eye(vocab_size)[teacher[3, :vocab_size].argmax()]  # a tail of exp(-60)
    upstream = torch.ones(TOKENS)
    for weights in ({"kd": 1.0, "ce": 0.0}, {"kd": 0.7, "ce": 0.3, "temperature": 2.5}):
        expected = oracle(student, teacher, labels, vocab_size, upstream, top_k=top_k, **weights)
        found = ranks(
            world,
            TERMS,
            student=student,
            teacher=teacher,
            labels=labels,
            vocab_size=vocab_size,
            starts=starts,
            weights=weights | {"top_k": top_k},
            upstream=upstream,
        )
        for result in found:
            assert relative(result["terms"]["kd"], expected["kd"]) < 2e-6
        assert relative(torch.cat([r["gradient"] for r in found], dim=1), expected["gradient"]) < 5e-6


def test_top_k_of_equal_logits_keeps_them_all() -> None:
    """Ids as likely as the k-th are in buckets of their own; with no id left the tail's bucket is empty."""
    student, _, _ = logits(seed=21)
    teacher = torch.zeros_like(student)
    weights = LossWeights(top_k=3)
    own = student.clone().requires_grad_()
    terms = distillation_terms(own, teacher, None, weights, Shard(0, VOCABULARY))
    terms.loss.sum().backward()
    expected = oracle(student, teacher, torch.zeros(TOKENS).long(), VOCABULARY, torch.ones(TOKENS), kd=1, ce=0)
    assert own.grad is not None
    assert relative(terms.kd, expected["kd"]) < 2e-6 and relative(own.grad, expected["gradient"]) < 2e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_telemetry(ranks: RankPools, world: int, starts: list[int], vocab_size: int, temperature: float) -> None:
    student, teacher, labels = logits(seed=30 + world)
    labels[:4] = teacher[:4, :vocab_size].argmax(1)
    valid = student[:, :vocab_size].double(), teacher[:, :vocab_size].double()
    expected = reference.telemetry(valid[1], valid[0], labels)
    for divergence in ("forward_kl", "jensen_shannon"):
        for result in ranks(
            world,
            TERMS,
            student=student,
            teacher=teacher,
            labels=labels,
            vocab_size=vocab_size,
            starts=starts,
            weights={"kd": 1.0, "temperature": temperature},
            upstream=torch.ones(TOKENS),
            divergence=(divergence,),
            telemetry=True,
        ):
            assert set(result["telemetry"]) == set(expected)
            for name, values in expected.items():
                assert relative(result["telemetry"][name], values) < 5e-6, name
            distance = reference.divergences(valid[1] / temperature, valid[0] / temperature, divergence)
            assert relative(result["terms"]["kd"], distance) < 3e-6


def test_a_constant_number_of_exchanges_whatever_the_terms(ranks: RankPools) -> None:
    """(numbers per token, tokens) of each all-gather: one for the two KLs and cross-entropy, two for the others."""
    student, teacher, labels = logits(seed=3)
    for weights, with_teacher, with_labels in itertools.product(WEIGHTS.values(), (True, False), (True, False)):
        for name in FAMILY if with_teacher else ("forward_kl",):
            if not (with_teacher or with_labels):
                continue
            expected = [(10 if with_teacher else 5, TOKENS)]
            if name not in ("forward_kl", "reverse_kl"):
                expected.append((2, TOKENS))
            for result in ranks(
                2,
                TERMS,
                student=student,
                teacher=teacher if with_teacher else None,
                labels=labels if with_labels else None,
                vocab_size=VOCABULARY,
                starts=[0, 11],
                weights=weights,
                upstream=torch.ones(TOKENS),
                divergence=(name,),
            ):
                assert result["collectives"] == [("all_gather_into_tensor", shape) for shape in expected]
                assert result["backward_collectives"] == []


@pytest.mark.parametrize("world", [1, 2, 4])
def test_padding_is_left_out(ranks: RankPools, world: int) -> None:
    """Columns that hold 10,000 change nothing and get no gradient; at TP 4 the last rank has no others."""
    student, teacher, labels = logits(seed=4)
    vocab_size, starts = 30, [0, 10, 20, 30][:world]
    student[:, vocab_size:] = teacher[:, vocab_size:] = 1e4
    weights, upstream = {"kd": 0.5, "ce": 0.5, "temperature": 2.0}, torch.ones(TOKENS)
    expected = oracle(student, teacher, labels, vocab_size, upstream, **weights)
    found = ranks(
        world,
        TERMS,
        student=student,
        teacher=teacher,
        labels=labels,
        vocab_size=vocab_size,
        starts=starts,
        weights=weights,
        upstream=upstream,
    )
    gradient = torch.cat([r["gradient"] for r in found], dim=1)
    assert relative(gradient, expected["gradient"]) < 2e-6
    assert torch.count_nonzero(gradient[:, vocab_size:]) == 0
    for result in found:
        for name, term in result["terms"].items():
            assert relative(term, expected[name]) < 2e-6


def test_bf16_inputs_are_computed_in_fp32(ranks: RankPools) -> None:
    student, teacher, labels = logits(seed=5, dtype=torch.bfloat16)
    weights, upstream = {"kd": 0.6, "ce": 0.4, "temperature": 2.0}, torch.ones(TOKENS)
    expected = oracle(student, teacher, labels, VOCABULARY, upstream, **weights)
    found = ranks(
        2,
        TERMS,
        student=student,
        teacher=teacher,
        labels=labels,
        vocab_size=VOCABULARY,
        starts=[0, 20],
        weights=weights,
        upstream=upstream,
    )
    assert relative(found[0]["terms"]["loss"], expected["loss"]) < 2e-6
    gradient = torch.cat([r["gradient"] for r in found], dim=1)
    assert gradient.dtype == torch.bfloat16
    assert relative(gradient, expected["gradient"]) < 2**-8, "one rounding to bf16"


@pytest.mark.parametrize("label_on", [0, 1, 2, 3])
def test_label_on_each_shard(ranks: RankPools, label_on: int) -> None:
    student, _, _ = logits(seed=6)
    starts = [0, 10, 20, 30]
    labels = torch.full((TOKENS,), starts[label_on])
    labels[0] = [*starts, VOCABULARY][label_on + 1] - 1
    weights, upstream = {"kd": 0.0, "ce": 1.0}, torch.ones(TOKENS)
    expected = oracle(student, student, labels, VOCABULARY, upstream, **weights)
    found = ranks(
        4,
        TERMS,
        student=student,
        teacher=None,
        labels=labels,
        vocab_size=VOCABULARY,
        starts=starts,
        weights=weights,
        upstream=upstream,
    )
    assert relative(found[0]["terms"]["ce"], expected["ce"]) < 2e-6
    assert relative(torch.cat([r["gradient"] for r in found], dim=1), expected["gradient"]) < 2e-6


def test_equal_logits_have_a_divergence_of_exactly_zero(ranks: RankPools) -> None:
    student, _, _ = logits(seed=7)
    for temperature, vocab_size, name in itertools.product((1.0, 0.3, 5.0), (VOCABULARY, 31), FAMILY):
        for result in ranks(
            2,
            TERMS,
            student=student,
            teacher=student,
            labels=None,
            vocab_size=vocab_size,
            starts=[0, 20],
            weights={"kd": 1.0, "temperature": temperature},
            upstream=torch.ones(TOKENS),
            divergence=(name,),
        ):
            assert torch.count_nonzero(result["terms"]["kd"]) == 0
            assert result["gradient"].abs().max() < 1e-6
            assert result["terms"]["agreement"].eq(1).all()


def test_divergence_is_never_negative_beyond_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    student = 10 * torch.randn(2000, 50, generator=generator)
    for distance in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        teacher = student + distance * torch.randn(2000, 50, generator=generator)
        kd = token_terms(student, teacher, None, kd_scale=1.0, ce_scale=0.0, temperature=1.0, shard=Shard(0, 50)).kd
        assert kd is not None and kd.min() > -4e-6


def test_temperature_vector() -> None:
    """Probabilities 0.99, 0.009, 0.001 become 0.609, 0.238, 0.153 at T = 5, and T^2 multiplies the loss."""
    teacher = torch.tensor([[0.99, 0.009, 0.001]]).log()
    student = torch.zeros(1, 3).requires_grad_()
    softened = torch.tensor([0.99, 0.009, 0.001], dtype=torch.float64) ** 0.2
    softened /= softened.sum()
    assert softened.tolist() == pytest.approx([0.609, 0.238, 0.153], abs=5e-4)
    divergence = (softened * (3 * softened).log()).sum().item()
    for squared, factor in ((True, 25.0), (False, 1.0)):
        weights = LossWeights(kd=2.0, ce=0.0, temperature=5.0, temperature_squared=squared)
        terms = distillation_terms(student, teacher, None, weights, Shard(0, 3))
        assert terms.kd is not None and terms.kd.item() == pytest.approx(divergence, rel=1e-5)
        assert terms.loss.item() == pytest.approx(2 * factor * divergence, rel=1e-5)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), student)
        torch.testing.assert_close(1 / 3 - gradient[0].double() * 5 / (2 * factor), softened, atol=1e-6, rtol=0)


def test_only_the_loss_carries_a_gradient_and_once() -> None:
    student, teacher, labels = logits(seed=8)
    terms = distillation_terms(
        student.requires_grad_(), teacher.requires_grad_(), labels, LossWeights(0.5, 0.5), Shard(0, VOCABULARY)
    )
    assert terms.loss.requires_grad
    assert not any(t.requires_grad for t in terms[1:] if t is not None)
    terms.loss.sum().backward(retain_graph=True)
    assert teacher.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.loss.sum().backward()


def test_measured_without_weight() -> None:
    """A term at weight 0 that is given its inputs is measured and leaves loss and gradient alone."""
    student, teacher, labels = logits(seed=9)
    results = []
    for given_labels in (labels, None):
        own = student.clone().requires_grad_()
        terms = distillation_terms(own, teacher, given_labels, LossWeights(1.0, 0.0, 2.0), Shard(0, VOCABULARY))
        terms.loss.sum().backward()
        results.append((terms.loss.detach(), own.grad))
    torch.testing.assert_close(results[0], results[1])
    assert terms.ce is None


def test_masked_tokens_and_ignored_labels() -> None:
    labels = torch.tensor([3, -100, 5, 7])
    valid = valid_tokens(labels, torch.tensor([1.0, 1.0, 0.0, 0.5]))
    assert valid.tolist() == [True, False, False, True]
    values = torch.tensor([1.0, torch.nan, torch.inf, 4.0], requires_grad=True)
    total = masked_sum(values, valid)
    assert total.item() == 5.0
    total.backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_identity_in_words() -> None:
    assert loss_identity(LossWeights()) == "loss = 1.0 * T^2 * KL(teacher || student, T=1.0) + 0.0 * CE"
    without = LossWeights(0.5, 0.25, 4.0, temperature_squared=False)
    assert loss_identity(without) == "loss = 0.5 * KL(teacher || student, T=4.0) + 0.25 * CE"
    words = {
        ("reverse_kl",): "KL(student || teacher, T=1.0)",
        ("jensen_shannon", 0.3): "JSD(teacher, student, beta=0.3, T=1.0)",
        ("skew_kl", 0.1): "KL(teacher || 0.1 * teacher + 0.9 * student, T=1.0)",
        ("total_variation",): "TV(teacher, student, T=1.0)",
    }
    for (name, *parameter), expected in words.items():
        weights = LossWeights(divergence=divergence_named(name, *parameter))
        assert loss_identity(weights) == f"loss = 1.0 * T^2 * {expected} + 0.0 * CE"
    assert "T=1.0) over the teacher's top 256 and the rest + 0.0" in loss_identity(LossWeights(top_k=256))


@pytest.mark.parametrize(
    "weights, named",
    [
        ({"kd": 0.0, "ce": 0.0}, "ce_weight=0.0"),
        ({"kd": -0.5, "ce": 1.0}, "kd_weight=-0.5"),
        ({"temperature": 0.0}, "0"),
    ],
)
def test_refuses_weights_that_make_no_loss(weights: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LossWeights(**weights)


def test_refuses_other_shapes() -> None:
    student, teacher, _ = logits(seed=0)
    with pytest.raises(ValueError, match="align_columns"):
        distillation_terms(student, teacher[:, :30], None, LossWeights(), Shard(0, 30))


def test_greatest_breaks_ties_by_the_lowest_id(ranks: RankPools) -> None:
    rows = torch.tensor(
        [
            [1.0, 7.0, 7.0, 0.0, 7.0, 2.0, 7.0, 9.0],  # 9.0 is padding
            [-0.0, -1.0, 0.0, 0.0, -3.0, -2.0, 0.0, 9.0],
            [-5.0, -4.0, -6.0, -3.0, -3.5, -2.0, -2.5, 9.0],
            [-torch.inf, -3e38, -torch.inf, -2e38, -torch.inf, -torch.inf, -torch.inf, 9.0],
        ]
    )
    for world in (1, 2, 4):
        for ids in ranks(world, "tests.core.cases_divergence:greatest_of", logits=rows, width=8 // world, vocab_size=7):
            assert ids.tolist() == [1, 0, 5, 3]
    assert greatest(torch.full((1, 4), torch.nan), Shard(0, 4), plain).isinf().all(), "no id where nothing is greatest"


@pytest.mark.parametrize("own_width, width", [(10, 8), (8, 10), (16, 8), (8, 8), (20, 8)])
def test_align_columns(ranks: RankPools, own_width: int, width: int) -> None:
    """Two models whose vocabularies of 30 are padded to different widths over four ranks."""
    logits = torch.arange(3 * 100, dtype=torch.float32).view(3, 100) + 1
    found = ranks(
        4,
        "tests.core.cases_divergence:aligned",
        logits=logits[:, : 4 * own_width],
        own_width=own_width,
        width=width,
        vocab_size=30,
    )
    whole = torch.cat(found, dim=1)
    assert torch.equal(whole[:, :30], logits[:, :30])
    assert own_width == width or torch.count_nonzero(whole[:, 30:]) == 0
