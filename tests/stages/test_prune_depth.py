"""The prune stage that measures what the removal of layers costs."""

import json
import random
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import load_file

from pipelines.choices import DepthMethod, Measure
from pipelines.core.selection import Kept
from pipelines.families import ModelShape
from pipelines.text import tokenizer
from pipelines.text.indexed import Writer
from pipelines.text.tokenizer_files import copy_tokenizer
from tests.model.teachers import random_weights, write_teacher
from tests.stages.test_prune import logits

RUN, ERROR = "tests.stages.cases_prune_depth:run", "tests.stages.cases_prune:error"
SHAPE = ModelShape(50, 16, 24, 6, 4, 2, 4)
LENGTH, SAMPLES = 16, 12  # of cases_prune
LAYOUTS = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"parallel.tensor": 2, "parallel.sequence_parallel": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "dp2": (2, {"prune.micro_batch_size": 5}),
}


def write_idle_teacher(directory, idle, shape=SHAPE):
    """A teacher whose layers `idle`, from 1, add nothing to the residual stream."""
    weights = random_weights(shape)
    weights["lm_head.weight"] *= 4  # so that some text is much likelier than other
    for number in idle:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{number - 1}.{name}.weight"].zero_()
    return write_teacher(directory, shape, weights)


def write_own_text(directory, teacher, vocab_size):
    """A calibration split that the teacher draws itself, window by window: any change makes it less likely."""
    generator, tokens = torch.Generator().manual_seed(3), [1]
    for _ in range(SAMPLES):
        window = tokens[-1:]
        for _ in range(LENGTH):
            odds = logits_of(teacher)(torch.tensor([window])).logits[0, -1].softmax(-1)
            window.append(int(torch.multinomial(odds, 1, generator=generator)))
        tokens += window[1:]
    writer = Writer(directory / "data" / "calibration" / "text", numpy.dtype(numpy.uint16))
    writer.add(numpy.array(tokens), numpy.array([len(tokens)]))
    writer.finish()
    entry = {"prefix": "data/calibration/text", "weight": 1.0}
    blend = {"splits": {"calibration": [entry]}, "vocab_size": vocab_size, "eod": 0}
    (directory / "blend.json").write_text(json.dumps(blend))
    return directory


def logits_of(directory, cache={}):  # noqa: B006 (one model for all windows)
    from transformers import AutoModelForCausalLM

    if directory not in cache:
        cache[directory] = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
        )
    return cache[directory]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """{idle layers: the teacher and its text}"""
    root, found = tmp_path_factory.mktemp("depth"), {}
    for idle in ((3, 4), (2, 5)):
        teacher = write_idle_teacher(root / f"teacher-{idle[0]}", idle)
        corpus = write_own_text(root / f"corpus-{idle[0]}", teacher, SHAPE.vocab_size)
        found[idle] = {"teacher": str(teacher), "corpus": str(corpus)}
    return found


def settings(method: DepthMethod, keep: int = 4, **others) -> dict:
    return {"student.num_hidden_layers": keep, "prune.depth_method": method, **others}


@pytest.mark.parametrize(
    ("method", "idle"),
    [(DepthMethod.contiguous, (3, 4)), (DepthMethod.greedy, (2, 5)), (DepthMethod.loss, (2, 5))],
    ids=["contiguous", "greedy", "loss"],
)
def test_idle_layers_are_found_and_the_student_computes_what_the_teacher_does(ranks, tmp_path, paths, method, idle):
    arguments = {"directory": str(tmp_path), "settings": settings(method, **{"parallel.tensor": 2}), **paths[idle]}
    figures, count = ranks(2, RUN, **arguments)[0]
    assert figures["dropped_layers"] == list(idle)
    told = figures["depth"]
    assert told["chosen"] == pytest.approx(told["whole"], rel=1e-6)
    assert told["measured"] == count == {"contiguous": 6, "greedy": 12, "loss": 8}[method.value]
    assert min(told["candidates"].values()) == pytest.approx(told["whole"], rel=1e-6)
    tokens = torch.randint(0, SHAPE.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = logits(paths[idle]["teacher"], tokens)
    assert (logits(tmp_path / "prune" / "hf", tokens) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_every_layout_measures_and_chooses_the_same(ranks, tmp_path, paths):
    found = {}
    for name, (world, layout) in LAYOUTS.items():
        arguments = {"directory": str(tmp_path / name), "settings": settings(DepthMethod.greedy, **layout)}
        figures = ranks(world, RUN, **arguments, **paths[3, 4])[0][0]
        found[name] = figures["dropped_layers"], load_file(tmp_path / name / "prune" / "scores.safetensors")
    dropped, arrays = found["tp1"]
    assert set(arrays) == {"removed"} | {
        f"removed_{n}" for n in ("loss", "task", "task_normalised", "task_log_probability")
    }
    assert arrays["removed"].sum(1).tolist() == [0] + [1] * 6 + [2] * 5
    for name in LAYOUTS:
        assert found[name][0] == dropped
        assert (found[name][1]["removed"] == arrays["removed"]).all()
        numpy.testing.assert_allclose(found[name][1]["removed_loss"], arrays["removed_loss"], rtol=2e-6, err_msg=name)


def test_losses_are_those_of_the_sliced_students_in_float64(ranks, tmp_path, paths):
    """Width is pruned in the same run, and does not enter the choice of layers."""
    from transformers import AutoModelForCausalLM

    from pipelines.model.slicing import slice_checkpoint
    from pipelines.model.windows import Windows, batches, split_prefixes

    width = {"student.hidden_size": 12, "student.intermediate_size": 20}
    arguments = {"directory": str(tmp_path), "settings": settings(DepthMethod.contiguous, **width), **paths[2, 5]}
    figures = ranks(1, RUN, **arguments)[0][0]
    assert figures["scores"] == "measured" and len(figures["dropped_layers"]) == 2
    teacher = Path(paths[2, 5]["teacher"])
    windows = Windows(split_prefixes(Path(paths[2, 5]["corpus"]), "calibration"), LENGTH)
    (batch,) = batches(windows, SAMPLES)
    for block, found in figures["depth"]["candidates"].items():
        first, last = map(int, block.split("-"))
        layers = [number for number in range(1, 7) if not first <= number <= last]
        whole = {"ffn": 24, "heads": 4, "groups": 2}
        kept = Kept(
            hidden=list(range(16)), layers=layers, **{a: {n: list(range(s)) for n in layers} for a, s in whole.items()}
        )
        slice_checkpoint(teacher, tmp_path / block, SHAPE, kept)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / block, dtype=torch.float32).double()
        with torch.no_grad():
            logs = model(batch["tokens"]).logits.log_softmax(-1)
        expected = -logs.gather(-1, batch["labels"][..., None]).mean().item()
        assert found == pytest.approx(expected, rel=1e-5), block


def test_a_killed_search_goes_on_and_another_target_measures_what_is_new(ranks, tmp_path, paths):
    arguments = {"directory": str(tmp_path), **paths[2, 5]}
    greedy = settings(DepthMethod.greedy, **{"parallel.tensor": 2})
    assert ranks(2, RUN, settings=greedy, fail_after=5, **arguments)[0] == ("'killed'", 5)
    assert len(load_file(tmp_path / "prune" / "scores.safetensors")["removed_loss"]) == 5
    figures, count = ranks(2, RUN, settings=greedy, **arguments)[0]
    assert (figures["dropped_layers"], count, figures["depth"]["measured"]) == ([2, 5], 12 - 5, 12 - 5)
    assert ranks(2, RUN, settings=greedy, **arguments)[0][1] == 0
    # One layer less: the same way as far as it goes.
    assert ranks(1, RUN, settings=settings(DepthMethod.greedy, 3), **arguments)[0][1] == 4
    # Each layer alone is the first step of it.
    assert ranks(1, RUN, settings=settings(DepthMethod.loss, 5), **arguments)[0][1] == 0
    # Fewer sequences are another measure.
    other = settings(DepthMethod.loss, 5, **{"prune.depth_samples": 4})
    assert ranks(1, RUN, settings=other, **arguments)[0][1] == 7
    # Those of another run are taken over.
    given = {"prune.scores": str(tmp_path / "prune" / "scores.safetensors")}
    elsewhere = arguments | {"directory": str(tmp_path / "elsewhere")}
    assert ranks(1, RUN, settings=other | given, **elsewhere)[0][1] == 0


def test_protected_layers_stay(ranks, tmp_path, paths):
    from pipelines.prune_settings import ProtectConfig

    protect = {"prune.protect": ProtectConfig(layers=[2])}
    arguments = {"directory": str(tmp_path), "settings": settings(DepthMethod.greedy, **protect), **paths[2, 5]}
    figures = ranks(1, RUN, **arguments)[0][0]
    assert 5 in figures["dropped_layers"] and 2 not in figures["dropped_layers"]


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    """A teacher with idle layers 3 and 4, a tokenizer, and questions whose right choice is its likeliest."""
    root, draw = tmp_path_factory.mktemp("quiz"), random.Random(5)
    words = [f"w{number}" for number in range(40)]
    shape = SHAPE.replace(vocab_size=300)
    teacher = write_idle_teacher(root / "teacher", (3, 4), shape)
    tokenizer.train((" ".join(draw.choices(words, k=20)) for _ in range(60)), shape.vocab_size, root / "tokenizer")
    copy_tokenizer(root / "tokenizer", teacher)
    found = tokenizer.load(teacher)
    lines = []
    for _ in range(12):
        query, choices = " ".join(draw.choices(words, k=6)), draw.sample(words, 3)
        likelihoods = []
        for choice in choices:
            ids = found.encode(f"{query} {choice}", add_special_tokens=False).ids
            start = len(found.encode(query, add_special_tokens=False).ids)
            logs = logits_of(teacher)(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            likelihoods.append(sum(logs[place - 1, ids[place]].item() for place in range(start, len(ids))))
        gold = likelihoods.index(max(likelihoods))
        lines.append(json.dumps({"query": query, "choices": choices, "gold": gold}))
    (root / "task.jsonl").write_text("\n".join(lines))
    corpus = write_own_text(root / "corpus", teacher, shape.vocab_size)
    return {"teacher": str(teacher), "corpus": str(corpus)}, str(root / "task.jsonl")


@pytest.mark.slow
def test_layers_are_chosen_by_the_score_of_a_task(ranks, tmp_path, quiz):
    paths, task = quiz
    by_task = {"prune.depth_measure": Measure.task, "prune.task": task}
    for name, (world, layout) in LAYOUTS.items():
        chosen = settings(DepthMethod.contiguous, **by_task, **layout)
        figures, count = ranks(world, RUN, directory=str(tmp_path / name), settings=chosen, **paths)[0]
        assert (figures["dropped_layers"], count) == ([3, 4], 6)
        told = figures["depth"]
        assert told["chosen"] == pytest.approx(told["whole"], rel=1e-5) and told["chosen"]["accuracy"] == 1
        assert all(value["accuracy"] < 1 for block, value in told["candidates"].items() if block != "3-4")
        arrays = load_file(tmp_path / name / "prune" / "scores.safetensors")
        assert numpy.isnan(arrays["removed_loss"]).all() and arrays["removed_task"].max() == 1
    # The loss of the same blocks comes beside it.
    figures, count = ranks(1, RUN, directory=str(tmp_path / "tp1"), settings=settings(DepthMethod.contiguous), **paths)[
        0
    ]
    assert (figures["dropped_layers"], count) == ([3, 4], 6)
    arrays = load_file(tmp_path / "tp1" / "prune" / "scores.safetensors")
    assert len(arrays["removed"]) == 6 and numpy.isfinite(arrays["removed_loss"]).all()
    # And the task's figures stay, although that run knew of no task.
    chosen = settings(DepthMethod.contiguous, **by_task)
    assert ranks(1, RUN, directory=str(tmp_path / "tp1"), settings=chosen, **paths)[0][1] == 0


def test_a_tokenizer_of_more_ids_than_the_teacher_has_is_refused(ranks, tmp_path, quiz):
    paths, task = quiz
    small = SHAPE.replace(vocab_size=200)
    teacher = write_teacher(tmp_path / "teacher", small, random_weights(small))
    copy_tokenizer(Path(paths["teacher"]), teacher)
    by_task = {"prune.depth_measure": Measure.task, "prune.task": task}
    chosen = settings(DepthMethod.contiguous, **by_task)
    arguments = {"directory": str(tmp_path / "run"), "corpus": paths["corpus"], "teacher": str(teacher)}
    message = ranks(1, ERROR, settings=chosen, **arguments)[0]
    assert "expected a tokenizer of at most the model's 200 ids" in message
