"""From hidden states and sharded heads to loss and gradients, against plain float64 at TP 1, 2 and 4."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipelines.core import chunk, linear_divergence, reference
from pipelines.core.family import FAMILY, divergence_named
from pipelines.core.linear_divergence import LinearTerms
from pipelines.core.vocab_parallel import Shard
from tests.core.memory import peak_bytes
from tests.ranks import RankPools

SHARDED = "tests.core.cases_linear:sharded"
TOKENS, VOCABULARY, STUDENT, TEACHER = 24, 53, 10, 14

# Where each rank's rows start; unequal, and in the last case a rank whose shard is all padding.
SHARDS = {
    "tp1": (1, [0], 53),
    "tp1_padded": (1, [0], 49),
    "tp2": (2, [0, 17], 53),
    "tp4": (4, [0, 7, 8, 40], 53),
    "tp4_one_all_padding": (4, [0, 15, 31, 47], 45),
}
KD_CE = {"kd_scale": 0.7 * 6.25, "ce_scale": 0.3, "temperature": 2.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "kd": {"kd_scale": 1.0, "ce_scale": 0.0, "temperature": 1.0},
    "kd_and_ce": {"kd_scale": 0.7, "ce_scale": 0.3, "temperature": 1.0},
    "kd_and_ce_hot": KD_CE,
    "ce": {"kd_scale": 0.0, "ce_scale": 1.0, "temperature": 1.0},
    "reverse_kl": KD_CE | {"divergence": ("reverse_kl",)},
    "jensen_shannon": KD_CE | {"divergence": ("jensen_shannon", 0.3)},
    "skew_kl": KD_CE | {"divergence": ("skew_kl", 0.1)},
    "total_variation": KD_CE | {"divergence": ("total_variation",)},
    "top_k": KD_CE | {"top_k": 6},
    "top_k_reverse": KD_CE | {"divergence": ("reverse_kl",), "top_k": 6},
    "taid": KD_CE | {"teacher_share": 0.4},
}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two models that agree on some tokens, labels below 45 of which two are -100, weights of which a third are 0."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (
        torch.randn(TOKENS, TEACHER, generator=generator) + 0.5,
        3 * torch.randn(VOCABULARY, TEACHER, generator=generator) / math.sqrt(TEACHER) + 0.3,
    )
    teacher = hidden.to(dtype), head.to(dtype)
    # Contiguous, as a model's are: of other strides a product may be summed in another order.
    student = hidden[:, :STUDENT].to(dtype).contiguous(), head[:, :STUDENT].to(dtype).contiguous()
    labels = torch.randint(0, 45, (TOKENS,), generator=generator)
    labels[[2, 17]] = -100
    weights = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) < 0.7)
    return {"student": student, "teacher": teacher, "labels": labels, "token_weights": weights}


def oracle(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    vocab_size: int,
    *,
    kd_scale: float,
    ce_scale: float,
    temperature: float,
    divergence: tuple[Any, ...] = ("forward_kl",),
    top_k: int | None = None,
    teacher_share: float | None = None,
    **_: Any,
) -> dict[str, torch.Tensor]:
    hidden, head = (t.double().requires_grad_() for t in student)
    s = (hidden @ head.t())[:, :vocab_size]
    t = (teacher[0].double() @ teacher[1].double().t())[:, :vocab_size]
    target = t if teacher_share is None else (1 - teacher_share) * s.detach() + teacher_share * t
    name, parameter = (*divergence, None)[:2]
    kd = reference.divergences(target / temperature, s / temperature, name, parameter, top_k)
    ce = F.cross_entropy(s, labels, reduction="none", ignore_index=-100)
    token_loss = kd_scale * kd + ce_scale * ce
    loss = (token_weights.double() * token_loss).sum()
    of_hidden, of_head = torch.autograd.grad(loss, (hidden, head))
    agreement = (s.argmax(1) == t.argmax(1)).double()
    found = {"loss": loss, "token_loss": token_loss, "kd": kd, "ce": ce, "agreement": agreement}
    return found | {"hidden": of_hidden, "head": of_head, **reference.telemetry(t, s, labels)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.norm() > 0, "a vacuous comparison"
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def gradients(found: list[dict[str, Any]], settings: dict[str, Any], head: str = "head") -> dict[str, torch.Tensor]:
    """Whole gradients out of the ranks' parts; what must be replicated is found so."""
    if settings.get("sequence_parallel"):
        hidden = torch.cat([result["hidden"] for result in found])
    else:
        hidden = found[0]["hidden"]
        assert all(torch.equal(result["hidden"], hidden) for result in found)
    return {"hidden": hidden, "head": torch.cat([result[head] for result in found])}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_values_and_gradients(
    ranks: RankPools, world: int, starts: list[int], vocab_size: int, settings: dict[str, Any]
) -> None:
    """In chunks of 8 tokens and in one; replicated hidden states and, at TP 2 and 4, the ranks' own parts."""
    given = tensors(seed=world)
    expected = oracle(**given, vocab_size=vocab_size, **settings)
    if not settings["kd_scale"]:
        given["teacher"] = None
    if not settings["ce_scale"]:
        given["labels"] = None
    for sequence_parallel in (False, True)[: 1 + (world > 1)]:
        for chunk_tokens, upstream in ((None, 1.0), (8, -0.5)):
            options = settings | {"sequence_parallel": sequence_parallel, "chunk_tokens": chunk_tokens}
            found = ranks(
                world, SHARDED, **given, vocab_size=vocab_size, starts=starts, settings=options, upstream=upstream
            )
            present = {"loss", "token_loss"} | ({"kd", "agreement"} if given["teacher"] else set())
            present |= {"ce"} if given["labels"] is not None else set()
            for result in found:
                assert set(result["terms"]) == present
                for name, term in result["terms"].items():
                    assert relative(term, expected[name]) < 5e-6, name
                    assert torch.equal(term, found[0]["terms"][name]), f"{name}: replicated bit for bit"
            for name, gradient in gradients(found, options).items():
                assert relative(gradient, upstream * expected[name]) < 1e-5, name
            assert torch.count_nonzero(gradients(found, options)["head"][vocab_size:]) == 0, "padding gets no gradient"


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"])
def test_collectives_of_a_chunk(ranks: RankPools, sequence_parallel: bool) -> None:
    """Three chunks of eight tokens at TP 2: the docstring's numbers, none in the backward pass, for each setting."""
    hidden = [("all_reduce", (8, STUDENT))]
    per_chunk = {"kd": 1, "kd_and_ce_hot": 1, "reverse_kl": 1, "jensen_shannon": 2, "top_k": 3, "taid": 2}
    for name, exchanges in per_chunk.items():
        settings = SETTINGS[name] | {"chunk_tokens": 8, "sequence_parallel": sequence_parallel}
        found = ranks(2, SHARDED, **tensors(seed=2), vocab_size=53, starts=[0, 17], settings=settings)
        for result in found:
            calls = result["collectives"]
            of_hidden = [call for call in calls if call[1][-1] in (STUDENT, TEACHER)]
            if sequence_parallel:
                hidden = [("all_gather_into_tensor", (4, STUDENT)), ("all_gather_into_tensor", (4, TEACHER))]
                hidden.append(("reduce_scatter_tensor", (8, STUDENT)))
            assert sorted(of_hidden) == sorted(3 * hidden)
            numbers = [call for call in calls if call not in of_hidden]
            assert len(numbers) == 3 * exchanges
            assert all(kind == "all_gather_into_tensor" for kind, _ in numbers)
            assert all(math.prod(shape) <= 12 * 8 for _, shape in numbers), "a few numbers per token"


@pytest.mark.parametrize("world, starts, vocab_size", SHARDS.values(), ids=SHARDS)
def test_head_gradient_into_a_given_tensor(ranks: RankPools, world: int, starts: list[int], vocab_size: int) -> None:
    """Added in the forward pass to what is there; the head itself gets none."""
    given, settings = tensors(seed=5), SETTINGS["kd_and_ce_hot"] | {"chunk_tokens": 8}
    expected = oracle(**given, vocab_size=vocab_size, **settings)
    found = ranks(world, SHARDED, **given, vocab_size=vocab_size, starts=starts, settings=settings, given=True)
    assert all(result["head"] is None for result in found)
    whole = gradients(found, settings, "given")
    assert relative(whole["hidden"], expected["hidden"]) < 1e-5
    assert relative(whole["head"] - 1, expected["head"]) < 2e-5
    assert torch.equal(whole["head"][vocab_size:], torch.ones(VOCABULARY - vocab_size, STUDENT))


def on_one(given: dict[str, Any], head_gradient: torch.Tensor | None = None, **settings: Any) -> LinearTerms:
    defaults = {"kd_scale": 1.0, "ce_scale": 0.5, "temperature": 1.0, "shard": Shard(0, VOCABULARY)}
    return linear_divergence.linear_divergence(
        *given["student"],
        *given["teacher"],
        given["labels"],
        given["token_weights"],
        head_gradient=head_gradient,
        **(defaults | settings),
    )


def trained(given: dict[str, Any]) -> dict[str, Any]:
    return given | {"student": tuple(t.clone().requires_grad_() for t in given["student"])}


def test_a_given_tensor_takes_an_upstream_gradient_of_one_alone() -> None:
    """Anything else would leave the head with a gradient that was not scaled: the hidden states' turns into NaN."""
    for upstream, finite in ((1.0, True), (0.5, False), (float("nan"), False)):
        given = trained(tensors(seed=6))
        (upstream * on_one(given, torch.zeros(VOCABULARY, STUDENT)).loss).backward()
        assert given["student"][0].grad.isfinite().all() == finite
        assert given["student"][0].grad.isnan().all() != finite


def test_micro_batches_add_up_in_a_given_tensor() -> None:
    total, expected = torch.zeros(VOCABULARY, STUDENT), torch.zeros(VOCABULARY, STUDENT, dtype=torch.float64)
    shared = tensors(seed=7)["student"][1]
    for seed in (7, 8, 9):
        given = tensors(seed)
        given["student"] = given["student"][0], shared
        expected += oracle(**given, vocab_size=VOCABULARY, kd_scale=1.0, ce_scale=0.5, temperature=1.0)["head"]
        on_one(trained(given), total).loss.backward()
    assert relative(total, expected) < 1e-5


@pytest.mark.parametrize("into_tensor", [False, True], ids=["autograd", "given"])
def test_tied_head(into_tensor: bool) -> None:
    """The head is the embedding too: its gradient is the sum of both uses."""
    given, ids = tensors(seed=10), torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        head = given["student"][1].to(dtype).requires_grad_()
        hidden = torch.tanh(head[ids])
        if dtype == torch.float32:
            total = torch.zeros_like(head) if into_tensor else None
            on_one(given | {"student": (hidden, head)}, total, chunk_tokens=10).loss.backward()
            assert head.grad is not None
            results.append(head.grad if total is None else head.grad + total)
        else:
            s, t = hidden @ head.t(), given["teacher"][0].double() @ given["teacher"][1].double().t()
            ce = F.cross_entropy(s, given["labels"], reduction="none", ignore_index=-100)
            losses = reference.divergences(t, s, "forward_kl") + 0.5 * ce
            results += torch.autograd.grad((given["token_weights"].double() * losses).sum(), head)
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("name", ["kd_and_ce_hot", "jensen_shannon", "top_k"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"])
def test_bf16(ranks: RankPools, sequence_parallel: bool, name: str) -> None:
    """Against a reference from the same rounded inputs: terms in fp32, the head's gradient summed in fp32."""
    given = tensors(seed=11, dtype=torch.bfloat16)
    settings = SETTINGS[name] | {"sequence_parallel": sequence_parallel, "chunk_tokens": 8}
    expected = oracle(**given, vocab_size=49, **settings)
    found = ranks(2, SHARDED, **given, vocab_size=49, starts=[0, 17], settings=settings, given=True)
    for term in ("loss", "token_loss", "kd", "ce", "agreement"):
        assert relative(found[0]["terms"][term], expected[term]) < 1e-5, "logits are not rounded to bf16"
    whole = gradients(found, settings, "given")
    assert whole["hidden"].dtype == torch.bfloat16
    assert relative(whole["hidden"], expected["hidden"]) < 1e-2
    assert relative(whole["head"] - 1, expected["head"]) < 2e-5


@pytest.mark.parametrize("world, sequence_parallel", [(1, False), (2, False), (2, True)])
def test_telemetry(ranks: RankPools, world: int, sequence_parallel: bool) -> None:
    given = tensors(seed=12)
    settings = KD_CE | {"telemetry": True, "chunk_tokens": 6, "sequence_parallel": sequence_parallel}
    expected = oracle(**given, vocab_size=53, **settings)
    given["labels"][:4] = (given["teacher"][0] @ given["teacher"][1].t()).argmax(1)[:4]
    expected = oracle(**given, vocab_size=53, **settings)
    names = {"overlap", "teacher_entropy", "student_confidence", "teacher_confidence"}
    names |= {"student_correct", "teacher_correct"}
    for result in ranks(world, SHARDED, **given, vocab_size=53, starts=[0, 17][:world], settings=settings):
        assert names < set(result["terms"])
        for name, term in result["terms"].items():
            if expected[name].norm() > 0:
                assert relative(term, expected[name]) < 5e-6, name


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_taid_at_its_ends(share: float) -> None:
    """t = 0: the student is its own target and nothing is to be learned; t = 1: the teacher, bit for bit."""
    given = trained(tensors(seed=13))
    terms = on_one(given, ce_scale=0.0, teacher_share=torch.tensor(share))
    terms.loss.backward()
    plain = trained(tensors(seed=13))
    expected = on_one(plain, ce_scale=0.0)
    expected.loss.backward()
    assert torch.equal(terms.agreement, expected.agreement), "agreement remains with the teacher"
    if share:
        assert torch.equal(terms.kd, expected.kd)
        assert torch.equal(given["student"][0].grad, plain["student"][0].grad)
    else:
        assert torch.count_nonzero(terms.kd) == 0
        assert given["student"][0].grad.abs().max() < 1e-5


def test_no_gradient_is_computed_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "gradient", lambda *_: pytest.fail("a gradient was computed"))
    total = torch.zeros(VOCABULARY, STUDENT)
    with torch.no_grad():
        terms = on_one(trained(tensors(seed=14)), total)
    assert not terms.loss.requires_grad and torch.count_nonzero(total) == 0
    assert not on_one(tensors(seed=14)).loss.requires_grad
    measured = on_one(trained(tensors(seed=14)), kd_scale=0.0, ce_scale=0.0)
    assert measured.loss.item() == 0 and torch.count_nonzero(measured.kd) > 0


def test_a_frozen_head() -> None:
    given, expected = tensors(seed=15), trained(tensors(seed=15))
    hidden = given["student"][0].clone().requires_grad_()
    on_one(given | {"student": (hidden, given["student"][1])}).loss.backward()
    on_one(expected).loss.backward()
    assert torch.equal(hidden.grad, expected["student"][0].grad)


def test_backward_once() -> None:
    terms = on_one(trained(tensors(seed=16)))
    terms.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms.loss.backward()


def test_masked_tokens_may_be_anything() -> None:
    """A token without weight whose hidden state is huge changes neither the loss nor a gradient."""
    given, spoiled = trained(tensors(seed=17)), tensors(seed=17)
    given["token_weights"][3] = spoiled["token_weights"][3] = 0
    spoiled["student"][0][3] *= 1e4
    spoiled = trained(spoiled)
    losses = []
    for one in (given, spoiled):
        losses.append(on_one(one).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    assert torch.equal(given["student"][1].grad, spoiled["student"][1].grad)
    assert torch.count_nonzero(spoiled["student"][0].grad[3]) == 0


@pytest.mark.parametrize("member", FAMILY)
def test_memory_is_flat_in_tokens(member: str) -> None:
    """Beyond the gradients: two buffers of one chunk, blocks of it, and numbers per token; nothing of tokens * V."""
    vocabulary, size, chunk_tokens = 6000, 16, 32
    peaks = []
    for tokens in (256, 1024):
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            (torch.randn(tokens, size, generator=generator), torch.randn(vocabulary, size, generator=generator))
            for _ in range(2)
        )
        student = tuple(t.requires_grad_() for t in student)
        given = {"student": student, "teacher": teacher, "labels": None, "token_weights": torch.ones(tokens)}

        def step(given: dict[str, Any] = given) -> None:
            terms = on_one(
                given,
                ce_scale=0.0,
                shard=Shard(0, vocabulary),
                chunk_tokens=chunk_tokens,
                divergence=divergence_named(member),
            )
            terms.loss.backward()

        of_gradients = 4 * (tokens * size + vocabulary * size)
        peaks.append(peak_bytes(step) - of_gradients)
    buffers = 2 * 4 * chunk_tokens * vocabulary
    assert peaks[1] - peaks[0] < 40 * 4 * (1024 - 256), "numbers per token"
    assert buffers <= peaks[1] < buffers + 8 * chunk._BLOCK_BYTES["cpu"] + 40 * 4 * 1024


@pytest.mark.parametrize("member", [name for name in FAMILY if name != "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_filter_leaves_out_no_more_than_its_bound(member: str, temperature: float) -> None:
    """Two models that put their mass on the first of three blocks of columns, one label in the last."""
    vocabulary, bound = 1400, 1e-4
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, STUDENT, generator=generator)
    heads = torch.randn(2, vocabulary, STUDENT, generator=generator)
    heads[:, :, 0] += torch.where(torch.arange(vocabulary) < 512, 4.0, -4.0) * temperature
    hidden[:, 0] = hidden[:, 0].abs() + 2
    labels = torch.randint(0, 512, (TOKENS,), generator=generator)
    labels[5] = 1300
    weights = torch.rand(TOKENS, generator=generator)
    logits = [hidden.double() @ head.double().t() for head in heads]
    found = []
    for filter_below in (None, bound):
        # The identity as hidden states and the logits as a head would be too large; the gradient into the logits is
        # that into the hidden states of an orthogonal head: solve for it.
        student = hidden.clone().requires_grad_(), heads[0].clone().requires_grad_()
        given = {"student": student, "teacher": (hidden, heads[1]), "labels": labels, "token_weights": weights}
        terms = on_one(
            given,
            kd_scale=2.0,
            ce_scale=0.5,
            temperature=temperature,
            shard=Shard(0, vocabulary),
            filter_below=filter_below,
            divergence=divergence_named(member),
        )
        terms.loss.backward()
        found.append((terms, student[0].grad.double(), student[1].grad.double()))
    (exact, of_hidden, of_head), (filtered, hidden_filtered, head_filtered) = found
    assert torch.equal(exact.token_loss, filtered.token_loss), "values are never filtered"
    left_out = slice(512, 1024)
    assert torch.count_nonzero(head_filtered[left_out]) == 0 and torch.count_nonzero(of_head[left_out]) > 0
    assert torch.count_nonzero(head_filtered[1024:]) > 0, "the block of a label stays"
    q, p = ((t / temperature).softmax(1)[:, left_out].sum(1) for t in logits)
    assert max(p.max(), q.max()) < 512 * bound and p.max() > 0
    q_at_1 = logits[0].softmax(1)[:, left_out].sum(1)
    allowed = weights.double() * (2.0 / temperature * (p + q) + 0.5 * q_at_1)
    error = hidden_filtered - of_hidden
    rows = heads[0].double()[left_out].norm(dim=1).max()
    assert error.norm() > 0 and (error.norm(dim=1) <= allowed * rows + 1e-6).all()
    error = (head_filtered - of_head)[left_out]
    assert error.abs().sum() <= (allowed.unsqueeze(1) * hidden.double().abs()).sum() + 1e-6
    assert relative(head_filtered, of_head) < 1e-2


@pytest.mark.parametrize(
    "settings, change, named",
    [
        ({"filter_below": 1e-5, "divergence": divergence_named("reverse_kl")}, {}, "reverse_kl"),
        ({"filter_below": 1e-5, "top_k": 4}, {}, "top_k"),
        ({"top_k": VOCABULARY}, {}, "top_k"),
        ({"temperature": 0.0}, {}, "temperature"),
        ({"telemetry": True}, {"labels": None}, "telemetry"),
        ({}, {"labels": torch.zeros(3).long()}, "labels: expected one for each of 24"),
        ({}, {"token_weights": torch.zeros(3)}, "token_weights"),
        ({}, {"teacher": (torch.zeros(TOKENS, 4), None)}, "found one of them"),
        ({}, {"teacher": (torch.zeros(TOKENS, 4), torch.zeros(VOCABULARY, 5))}, "teacher: expected hidden"),
        ({}, {"teacher": (torch.zeros(3, 4), torch.zeros(VOCABULARY, 4))}, "24 tokens"),
        ({}, {"teacher": (torch.zeros(TOKENS, 4), torch.zeros(VOCABULARY - 1, 4))}, "align_columns"),
        ({}, {"teacher": (torch.zeros(TOKENS, 4).bfloat16(), torch.zeros(VOCABULARY, 4))}, "one dtype"),
        ({}, {"teacher": (None, None), "labels": None}, "found neither"),
    ],
)
def test_refuses_what_does_not_fit(settings: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        on_one(tensors(seed=0) | change, **settings)
