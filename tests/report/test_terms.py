"""The teacher's licence: what is stated, what it asks of the student, and how the model card carries it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.config import Config, TeacherMode
from pipelines.report import card, summary, terms
from pipelines.report.record import read_run
from tests.stages.sample_run import write_sample_run

LLAMA = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024\n"


def teacher(place: Path, **files: str) -> Path:
    place.mkdir()
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text)
    return place


@pytest.mark.parametrize(
    ("files", "licence", "llama", "header"),
    [
        ({}, None, None, {}),
        ({"README__md": "---\nlicense: Apache-2.0\n---\n"}, "Apache-2.0", None, {"license": "apache-2.0"}),
        ({"README__md": "---\nlicense: llama3.1\n---\n"}, "llama3.1", "3.1", {"license": "llama3.1"}),
        (
            {"README__md": '---\nlicense: other\nlicense_name: "llama3"\n---\n', "LICENSE__txt": LLAMA},
            "llama3",
            "3",
            {"license": "llama3"},
        ),
        (
            {"LICENSE": LLAMA},
            "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
            "3.1",
            {"license": "other", "license_name": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "license_link": "LICENSE"},
        ),
        ({"README__md": "---\ntags: [x]\n---\n", "LICENSE": "\nMIT License\n"}, "MIT License", None, None),
    ],
)
def test_what_a_directory_states(
    tmp_path: Path, files: dict[str, str], licence: str | None, llama: str | None, header: dict[str, str] | None
) -> None:
    found = terms.read(teacher(tmp_path / "hf", **files))
    assert (found.licence, found.llama) == (licence, llama)
    assert header is None or terms.header(found) == header


def test_llamas_licence_asks_for_name_notice_and_copy(tmp_path: Path) -> None:
    found = terms.read(teacher(tmp_path / "hf", LICENSE=LLAMA, USE_POLICY__md="policy"))
    assert [file.name for file in found.files] == ["LICENSE", "USE_POLICY.md"]
    assert found.notice.startswith("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright ©")
    assert found.name("mine") == "Llama-mine" and found.name("llama-4b") == "llama-4b"
    assert 'its name begin with "Llama"' in " ".join(found.asks()) and "Add a copy" not in " ".join(found.asks())
    alone = terms.read(teacher(tmp_path / "card", README__md="---\nlicense: llama3\n---\n"))
    assert alone.name("Llama-4B") == "Llama-3-Llama-4B" and alone.name("Llama 3 4B") == "Llama 3 4B"
    assert "Add a copy of the Llama 3 licence" in alone.asks()[0]
    second = terms.read(teacher(tmp_path / "second", README__md="---\nlicense: llama2\n---\n"))
    assert second.name("mine") == "mine" and "LLAMA 2" in second.notice


def test_what_the_user_states_goes_before_and_meta_still_asks(tmp_path: Path) -> None:
    assert "set export.terms" in terms.read(tmp_path / "nothing").asks()[0]
    assert terms.read(tmp_path / "nothing", "apache-2.0").asks() == []
    found = terms.read(teacher(tmp_path / "hf", LICENSE=LLAMA), "apache-2.0")
    assert found.licence == "apache-2.0" and found.llama == "3.1" and found.name("mine") == "Llama-mine"


def test_terms_are_those_of_the_model_that_was_given(tmp_path: Path) -> None:
    config = Config()
    config.run.directory, config.model.path = str(tmp_path), str(teacher(tmp_path / "given", LICENSE=LLAMA))
    config.teacher.mode = TeacherMode.correct
    assert card.terms_of(config).llama == "3.1"
    config.teacher.mode = TeacherMode.pretrain
    assert card.terms_of(config).licence is None


@pytest.fixture
def run(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    directory = write_sample_run(tmp_path / "quickstart")
    path = directory / "evaluate" / "results.json"
    results = json.loads(path.read_text())
    results["models"]["student"]["intervals"] = {"loss": [2.9, 2.95]}
    task = {"metric": "acc", "value": 0.5, "stderr": 0.02, "shots": 5}
    results["tasks"] = {"models": {"teacher": {"arc": task | {"value": 0.6}}, "student": {"arc": task}}}
    speeds = {"time_to_first_token_ms": 10.0, "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 50.0}
    row = {"model": "student", "batch": 2, "prompt_tokens": 8, "new_tokens": 4, "ratio": dict.fromkeys(speeds, 1.5)}
    results["efficiency"] = {
        "device": "cpu",
        "threads": 2,
        "dtype": "fp32",
        "form": "transformers 4",
        "rows": [row | speeds],
    }
    path.write_text(json.dumps(results))
    config = Config()
    config.run.directory, config.run.name = str(tmp_path), "quickstart"
    record = read_run(config)
    return record, summary.results(record)


def rendered(run: tuple[Any, dict[str, Any]], tmp_path: Path, **more: Any) -> str:
    record, results = run
    place = tmp_path / "teacher-hf"
    return card.render(record, results | more.pop("results", {}), teacher=place, student=place, prompt="def", **more)


def test_the_card_has_intervals_tasks_speeds_and_how_it_was_made(
    run: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    text = rendered(run, tmp_path)
    assert "| Loss (nats/token) | 2.9000 | 5.4000 | 2.9300 (2.9000 to 2.9500) |" in text
    assert "| arc, acc, 5 shots | 0.6000 ± 0.0200 | – | 0.5000 ± 0.0200 |" in text
    assert "| batch 2, 8 + 4 tokens | 10.0 (1.50×) | 100.0 (1.50×) | 50.0 (1.50×) |" in text
    assert "student on cpu, 2 threads, fp32, transformers 4" in text
    assert "No licence is stated in the teacher's directory" in text and "license:" not in text
    yaml.safe_load(text.split("---")[1])


def test_words_from_elsewhere_are_text_on_the_card(run: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    stated = terms.read(tmp_path / "nothing", "<script>alert(1)</script> [free](http://x) | `a`")
    text = rendered(run, tmp_path, under=stated)
    body = text.split("---", 2)[2]
    assert "- Licence: &lt;script&gt;alert(1)&lt;/script&gt; \\[free\\](http://x) \\| \\`a\\`. The student" in body
    assert "<script>" not in body


@pytest.mark.parametrize(
    ("given", "place", "name"),
    [
        ("/models/Llama-3.1-8B", "runs/a/teacher/hf", "Llama-3.1-8B"),
        ("/c/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f", "runs/a/teacher/hf", "meta-llama/Llama-3.1-8B"),
        (None, "runs/a/teacher/hf", "trained in the run quickstart"),
        (None, "/elsewhere/mine", "mine"),
    ],
)
def test_the_card_has_the_teacher_s_name_and_no_place_of_this_machine(
    run: tuple[Any, dict[str, Any]], given: str | None, place: str, name: str
) -> None:
    record, results = run
    record.manifests["teacher"]["inputs"] = {"model": {"path": given}} if given else {}
    text = card.render(record, results, teacher=Path(place), student=Path("none"), prompt="def")
    assert f"- Teacher: {name}\n" in text


def test_the_card_of_a_quantized_form(run: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    before = {"bytes": 4000, "loss": 2.93, "kl": 0.05}
    row = {
        "name": "int8",
        "of": "student",
        "method": "int8",
        "bits": 8,
        "group": None,
        "library": "compressed-tensors 0",
    }
    row |= {"bytes": 1500, "loss": 2.94, "kl": 0.06, "differences": [{"figure": "loss", "larger_than_noise": False}]}
    found = {"before": {"student": before}, "variants": [row, {"name": "int4", "of": "student", "refused": "why"}]}
    under = terms.read(teacher(tmp_path / "hf", LICENSE=LLAMA))
    text = rendered(run, tmp_path, results={"quantized": found}, under=under, form=row)
    assert "# Llama-quickstart-int8: a quantized form of" in text and "Built with Llama" in text
    assert (
        "| int8 | 1,500 | 2.9400, within noise | 0.0600 |" in text and "| student | 4,000 | 2.9300 | 0.0500 |" in text
    )
    assert 'dtype="auto"' in text and "int4" not in text and "8-bit integers with a scale per output channel" in text
    assert yaml.safe_load(text.split("---")[1])["license_link"] == "LICENSE"
    assert 'dtype="auto"' not in rendered(run, tmp_path, under=under)
