"""The export stage: an equal copy that transformers opens, and every way in which it must refuse one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from pipelines import files
from pipelines.choices import Quantization
from pipelines.config import UserError
from pipelines.stages import export
from tests.ranks import RankPools
from tests.stages import small_run

CASE = "tests.stages.cases_evaluate:run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_small_run(tmp_path_factory.mktemp("export") / "runs")


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "runs")
    return tmp_path / "runs"


def change_weight(directory: Path, name: str = "model.layers.1.mlp.down_proj.weight") -> None:
    (path,) = directory.glob("*.safetensors")
    weights = load_file(path)
    weights[name][0] += 1.0
    save_file(weights, path, {"format": "pt"})


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record_again(root: Path) -> None:
    """What distil would have written in its manifest, had it made the files that lie there now."""
    directory = root / "small" / "distil"
    outputs = files.fingerprint(directory, root / ".hashes")
    files.write_json(directory / "manifest.json", {"stage": "distil", "outputs": outputs, "inputs": {}})


@pytest.mark.parametrize(("world", "settings"), [(1, {}), (2, {"parallel__tensor": 2}), (2, {"parallel__pipeline": 2})])
def test_exports_an_equal_model(ranks: RankPools, root: Path, world: int, settings: dict[str, int]) -> None:
    figures = ranks(world, CASE, stage="export", root=str(root), **settings)[0]
    assert "error" not in figures, figures
    source, target = root / "small/distil/hf", root / "small/export/hf"
    assert 0 <= figures["relative_difference"] < 1e-5 and figures["largest_difference"] < 1e-4
    assert figures["generated"].startswith("def main(") and len(figures["generated"]) > len("def main(")
    assert figures["bytes"] == sum(file.stat().st_size for file in target.iterdir())
    for file in source.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()
        assert not (target / file.name).samefile(file)
    card = (target / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "## Lineage" in card
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, target))
    assert torch.equal(one, other)


@pytest.mark.parametrize("change", [change_weight, lambda d: change_config(d, rms_norm_eps=0.1)])
def test_files_changed_since_distil_are_refused(ranks: RankPools, root: Path, change) -> None:
    change(root / "small/distil/hf")
    (figures,) = ranks(1, CASE, stage="export", root=str(root))
    assert "has changed since" in figures["error"]
    assert not (root / "small/export/hf").exists() and not (root / "small/export/hf.partial").exists()


def reference(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return tokens, AutoModelForCausalLM.from_pretrained(directory)(tokens).logits


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        lambda d: change_config(d, rms_norm_eps=0.1),
        lambda d: change_config(d, rope_theta=100.0),
    ],
)
def test_other_logits_are_refused(root: Path, change) -> None:
    directory = root / "small/distil/hf"
    tokens, logits = reference(directory)
    export.compare(directory, export.reload(directory), tokens, logits, tolerance=1e-6)
    change(directory)
    with pytest.raises(UserError, match="found a relative difference of"):
        export.compare(directory, export.reload(directory), tokens, logits, tolerance=1e-3)


def test_weights_missing_for_the_config_are_refused(root: Path) -> None:
    directory = root / "small/distil/hf"
    change_config(directory, num_hidden_layers=3)
    with pytest.raises(UserError, match="missing_keys"):
        export.reload(directory)


def test_a_truncated_file_is_refused(root: Path) -> None:
    directory = root / "small/distil/hf"
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="expected a directory that transformers opens"):
        export.reload(directory)


def test_a_failed_comparison_leaves_nothing_behind(ranks: RankPools, root: Path) -> None:
    (figures,) = ranks(1, CASE, stage="export", root=str(root), export__tolerance=0.0)
    assert "export.tolerance=0" in figures["error"]
    assert not list((root / "small/export").glob("hf*"))


def test_the_teachers_terms_go_with_the_student(ranks: RankPools, root: Path) -> None:
    teacher = root / "small/teacher/hf"
    (teacher / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    (teacher / "USE_POLICY.md").write_text("policy")
    quantize = [Quantization.int8]
    figures = ranks(1, CASE, stage="export", root=str(root), export__quantize=quantize, export__terms="llama3.2")[0]
    assert "error" not in figures, figures
    for place, name in (("hf", "Llama-small"), ("int8", "Llama-small-int8")):
        directory = root / "small/export" / place
        assert (directory / "LICENSE").read_text().startswith("LLAMA 3.2")
        assert (directory / "USE_POLICY.md").read_text() == "policy"
        assert (directory / "NOTICE").read_text().startswith("Llama 3.2 is licensed under the Llama 3.2 Community")
        card = (directory / "README.md").read_text()
        assert 'license: "llama3.2"' in card and f"# {name}: " in card and "| int8 |" in card
    assert 'dtype="auto"' in card


def test_text_is_generated_as_before_whatever_the_loss_temperature_was(ranks: RankPools, root: Path) -> None:
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    source = root / "small/distil/hf"
    (source / "generation_config.json").write_text(json.dumps(own))
    record_again(root)
    (figures,) = ranks(1, CASE, stage="export", root=str(root), distil__temperature=4.0)
    assert "error" not in figures, figures
    assert json.loads((root / "small/export/hf/generation_config.json").read_text()) == own
    assert GenerationConfig.from_pretrained(root / "small/export/hf").temperature == 0.6
