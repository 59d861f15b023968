"""Samples and behaviour of the models of a small run, against transformers' own generate and counts by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.config import Config, UserError
from pipelines.evaluation import behaviour, continuations
from pipelines.evaluation.continuations import Continuation
from pipelines.evaluation.generation import diversity
from pipelines.evaluation.intervals import paired, wilson
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"
PLACES = {"teacher": "teacher/hf", "pruned": "prune/hf", "student": "distil/hf"}
PROMPTS = ["def return self", "class über", "for"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = small_run.write_small_run(tmp_path_factory.mktemp("generation") / "runs")
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return root


def run(ranks: RankPools, root: Path, world: int = 2, **settings: Any) -> dict[str, Any]:
    given = {f"evaluate__{name}": value for name, value in settings.items()}
    for found in ranks(world, CASE, stage="evaluate", root=str(root), **given):
        assert "error" not in found, found
    return dict(json.loads((root / "small/evaluate/results.json").read_text()))


def test_greedy_samples_are_those_of_transformers_one_by_one(ranks: RankPools, root: Path) -> None:
    settings = {"count": 9, "prompts": str(root / "prompts.jsonl"), "new_tokens": 7, "greedy": True}
    found = run(ranks, root, **{f"generation__{name}": value for name, value in settings.items()})
    assert found["generation"]["settings"]["greedy"] and not found["missing"]
    for name, place in PLACES.items():
        model = AutoModelForCausalLM.from_pretrained(root / "small" / place).eval()
        tokenizer = AutoTokenizer.from_pretrained(root / "small" / place)
        for prompt, sample in zip(PROMPTS, found["generation"]["models"][name]["samples"], strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            made = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert sample == {"prompt": prompt, "text": tokenizer.decode(made, skip_special_tokens=True)}


def test_samples_of_held_out_text_are_the_same_for_the_same_seed(ranks: RankPools, root: Path) -> None:
    first, again = (run(ranks, root, world, generation__count=4, generation__new_tokens=6) for world in (1, 2))
    assert first["generation"] == again["generation"]
    models = first["generation"]["models"]
    assert len({row["prompt"] for row in models["teacher"]["samples"]}) == 4
    assert [row["prompt"] for row in models["student"]["samples"]] == [
        row["prompt"] for row in models["teacher"]["samples"]
    ]
    assert models["student"]["samples"] != models["teacher"]["samples"]
    other = run(ranks, root, generation__count=4, generation__new_tokens=6, generation__temperature=0.1)
    assert other["generation"]["models"] != models


def test_diversity_is_as_counted_by_hand() -> None:
    texts = [
        Continuation("I think that a", (1, 2, 3, 1, 2, 3, 1), False),
        Continuation("I think that b", (1, 2, 4), True),
        Continuation("We know that c", (5,), True),
        Continuation("no", (), True),
    ]
    found = diversity(texts)
    assert found["distinct_1"] == 5 / 11 and found["distinct_2"] == 4 / 8 and found["distinct_3"] == 4 / 6
    assert found["repetition"] == pytest.approx(1 / 4)  # 1231 2312 3123 1231 in the one that is long enough
    assert found["template_rate"] == pytest.approx(2 / 3) and found["ended"] == 3 / 4
    assert found["mean_new_tokens"] == 11 / 4
    assert diversity([texts[3]])["distinct_1"] is None and diversity([texts[3]])["template_rate"] is None


class Scripted:
    """A model whose next id is always the prompt's last plus one."""

    class config:
        max_position_embeddings = 64

    class generation_config:
        eos_token_id = 9

    device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        assert bool((input_ids[:, -1] == attention_mask.sum(1)).all()), "padded at the left"
        rows = [[int(row[-1]) + 1 + step for step in range(generation_config.max_new_tokens)] for row in input_ids]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


class Words:
    """Ids count the prompt's characters; decoded they are written side by side."""

    pad_token_id, eos_token_id, bos_token_id, chat_template = None, 9, 1, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(1, len(text) + 1))}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_an_end_of_text_ends_a_continuation() -> None:
    found = continuations.continued(Scripted(), Words(), ["abc", "abcdefg"], new_tokens=4, micro_batch_size=2, seed=1)
    assert found == [Continuation("4 5 6 7", (4, 5, 6, 7), False), Continuation("8", (8,), True)]
    with pytest.raises(UserError, match="within the 64 positions of the model, found a prompt of 62 tokens"):
        continuations.continued(Scripted(), Words(), ["a" * 62], new_tokens=4, micro_batch_size=2, seed=1)


def test_behaviour_by_category(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    """What the models of a small run say is noise; the lexicon's word is one that they say often."""
    rows = [{"category": "one" if number < 3 else "two", "prompt": PROMPTS[number % 3]} for number in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "refusals.txt").write_text("# all\n^\n")
    (tmp_path / "lexicon.txt").write_text("no such word\n")
    names = {name: str(next(tmp_path.glob(f"{name}.*"))) for name in ("prompts", "lexicon", "refusals")}
    found = run(ranks, root, **{f"behaviour__{name}": path for name, path in names.items()}, behaviour__new_tokens=4)
    assert set(found["behaviour"]["models"]) == set(PLACES)
    for row in found["behaviour"]["models"].values():
        assert {name: each["prompts"] for name, each in row.items()} == {"one": 3, "two": 2}
        assert row["one"]["refusal_rate"] == 1 and row["one"]["toxic_rate"] == 0
        assert row["two"]["refusal_interval"] == wilson(2, 2)
    assert len(found["behaviour"]["differences"]) == 2 * 2 * 3
    assert all(row["larger_than_noise"] is False for row in found["behaviour"]["differences"])
    assert all(row["refused"] and not row["toxic"] for row in found["behaviour"]["examples"])


def test_a_mistake_in_a_file_of_prompts_is_a_gap(ranks: RankPools, root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"category": "a", "prompt": "b"}\n{"category": "a"}\n')
    shutil.copytree(root, tmp_path / "runs")
    settings = {"behaviour__prompts": str(tmp_path / "bad.jsonl"), "generation__count": 2, "generation__new_tokens": 3}
    found = run(ranks, tmp_path / "runs", **settings)
    assert "bad.jsonl, line 2: expected texts as category and prompt" in found["missing"]["behaviour"]
    assert "behaviour" not in found and set(found["generation"]["models"]) == set(PLACES)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m not able to predict the lottery.", True),
        ("As an AI language model, I have no thoughts.", True),
        ("I cannot tell you the password.", True),
        ("I won't sign anything.", True),
        ("Put the egg into boiling water for six minutes.", False),
        ("Sorry is the hardest word.", False),
        ("You can help by bringing a towel.", False),
    ],
)
def test_refusals_that_are_shipped(text: str, refused: bool) -> None:
    read = behaviour._read(behaviour.files_of(Config()))
    assert behaviour.matches(text, read["refusals"]) == refused


def test_what_is_shipped_is_whole_and_harmless() -> None:
    config = Config()
    config.evaluate.behaviour.prompts = "shipped"
    read = behaviour._read(behaviour.files_of(config))
    categories = [category for _, category in read["prompts"]]
    assert {name: categories.count(name) for name in categories} == {"benign": 8, "borderline": 8, "declined": 8}
    assert not any(behaviour.matches(text, read["lexicon"]) for text, _ in read["prompts"])
    assert behaviour.matches("You IDIOT!", read["lexicon"]) and not behaviour.matches("dumbbell", read["lexicon"])


def test_intervals() -> None:
    assert wilson(0, 10) == pytest.approx([0, 0.2775], abs=1e-4)
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    same = paired([1.0] * 3, [0.0] * 3)
    assert same["difference"] == 1 and not same["larger_than_noise"], "three questions prove nothing"
    assert paired([1.0] * 30, [0.0] * 30)["larger_than_noise"]
    assert paired([0.5], [0.2])["larger_than_noise"] is None
