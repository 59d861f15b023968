"""The rules of the house: who may import whom, that every shipped file composes, that the README tells the truth."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import planning
from pipelines.__main__ import stage_names
from pipelines.compose import GROUPS, compose, conf_directory, group_options
from pipelines.stages import PIPELINE, STAGES
from pipelines.validation import validate

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pipelines"
SHARED = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"} | {"validation"}
HEAVY = {"torch", "megatron", "nemo", "lightning", "pytorch_lightning", "transformers", "transformer_engine"}
# room: (packages outside Python's own that it may import, rooms of ours that it may import)
LAW: dict[str, tuple[set[str], set[str]]] = {
    "validation": (set(), {"validation"}),
    "cluster": (set(), {"cluster", "__main__"}),  # another command line over the same stages
    "core": ({"torch", "triton"}, {"core"}),
    "model": ({"torch", "megatron", "safetensors", "transformer_engine", "numpy"}, {"core", "model", "text"}),
    "trainer": (
        {"torch", "megatron", "nemo", "lightning", "transformer_engine", "yaml", "wandb", "mlflow", "tensorboard"},
        {"core", "model", "trainer"},
    ),
    "pruning": ({"torch", "megatron", "safetensors", "numpy"}, {"core", "model", "trainer", "text", "pruning"}),
    "evaluation": (
        {"torch", "megatron", "safetensors", "numpy", "transformers", "lm_eval", "datasets", "vllm"},
        {"core", "model", "text", "serving", "evaluation"},
    ),
    "serving": (
        {"torch", "megatron", "safetensors", "transformers", "compressed_tensors", "vllm", "tensorrt_llm"},
        {"core", "model", "text", "evaluation", "serving"},
    ),
    "text": ({"numpy", "tokenizers", "datasets", "pyarrow", "transformers"}, {"text"}),
    "report": ({"jinja2", "matplotlib", "markupsafe", "numpy", "safetensors", "yaml"}, {"report"}),
    "stages": (
        {"torch", "megatron", "numpy", "safetensors", "transformers", "tokenizers", "yaml", "rich"}
        | {"huggingface_hub", "requests"},  # the hub is asked by fetch alone
        {"core", "model", "trainer", "pruning", "evaluation", "serving", "text", "report"},
    ),
}
README = (ROOT / "README.md").read_text()


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(path: Path, names: list[str]) -> list[str]:
    """Imports of a module that the law does not allow."""
    room = path.relative_to(PACKAGE).parts[0]
    outside, ours = LAW.get(room, ({"hydra", "omegaconf", "rich", "yaml"}, set()))
    found = []
    for name in names:
        parts = name.split(".")
        if parts[0] == "pipelines":
            table = parts[1:] == ["stages"] or (parts[1:2] == ["stages"] and parts[2:3] and parts[2][0].isupper())
            table = table and room not in ("core", "model", "trainer", "pruning", "evaluation", "serving")
            allowed = len(parts) == 1 or parts[1] in SHARED | ours or table
            if path.name == "__main__.py" and name.startswith("pipelines.stages"):
                allowed = True
        else:
            allowed = parts[0] in outside or parts[0] in sys.stdlib_module_names
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_against_the_law_of_the_rooms(path: Path) -> None:
    assert breaches(path, list(imports(path))) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("core/loss.py", "megatron.core"),
        ("core/loss.py", "pipelines.model.step"),
        ("model/step.py", "nemo.lightning"),
        ("model/step.py", "pipelines.trainer.fit"),
        ("model/step.py", "hydra"),
        ("trainer/fit.py", "pipelines.stages.distil"),
        ("trainer/run.py", "pipelines.stages.STAGES"),
        ("trainer/run.py", "pipelines.pruning.calibration"),
        ("pruning/calibration.py", "pipelines.stages.prune"),
        ("stages/distil.py", "pipelines.stages.teacher"),
        ("stages/distil.py", "nemo.collections"),
        ("text/sources.py", "torch"),
        ("planning.py", "torch"),
        ("cluster/chain.py", "torch"),
        ("cluster/chain.py", "pipelines.stages.distil"),
        ("artifacts.py", "pipelines.model.build"),
    ],
)
def test_the_law_refuses(path: str, name: str) -> None:
    assert breaches(PACKAGE / path, [name]) == [name]


def test_every_room_has_a_law() -> None:
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))} == LAW.keys()


def loaded_after_importing(names: list[str]) -> set[str]:
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_what_answers_in_a_second_loads_nothing_heavy() -> None:
    light = [f"pipelines.{name}" for name in sorted(SHARED)] + [
        "pipelines.__main__",
        "pipelines.stages.plan",
        "pipelines.cluster.__main__",
    ]
    assert not loaded_after_importing(light) & HEAVY


def test_the_corpus_is_made_without_torch() -> None:
    assert not loaded_after_importing(["pipelines.stages.corpus"]) & {"torch", "megatron", "nemo", "lightning"}


@pytest.mark.slow
def test_core_and_model_load_no_nemo() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ("core", "model")
        for path in (PACKAGE / room).glob("*.py")
        if path.stem != "__init__"
    ]
    assert not loaded_after_importing(names) & {"nemo", "lightning", "pytorch_lightning", "hydra", "nemo_run"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting_and_a_function_on_one_screen(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80
    ]
    assert long == []


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "experiment"])
def test_every_option_of_a_group_composes(group: str) -> None:
    assert group_options(group)
    for option in group_options(group):
        assert compose([f"{group}={option}"])


def test_conf_has_no_group_that_is_not_listed() -> None:
    assert {path.name for path in conf_directory().iterdir() if path.is_dir()} == set(GROUPS)


@pytest.mark.parametrize("name", group_options("experiment"))
def test_every_experiment_composes_validates_and_says_what_it_is(name: str) -> None:
    config = compose([f"experiment={name}"])
    given = [setting for setting in (config.model.path, config.student.path) if setting]  # of another run
    assert len(validate(config, ["plan"])) <= len(given)
    assert config.run.name == name.replace("/", "_")
    header = dict(
        re.findall(r"^# (\w+): +(\S.*)$", (conf_directory() / "experiment" / f"{name}.yaml").read_text(), re.M)
    )
    assert list(header) == ["purpose", "command", "hardware", "time", "number"]
    if header["command"].startswith("make "):
        assert f"experiment={name}\n" in (ROOT / "Makefile").read_text()
    else:
        check_command(header["command"])
        assert f"experiment={name} " in header["command"] + " "


def check_command(command: str) -> None:
    """A documented command names stages and settings that exist."""
    words = shlex.split(command, comments=True)
    overrides = [word for word in words if "=" in word and not word.isupper()]
    stage_names(compose(overrides))


def documents() -> list[Path]:
    return sorted(path for pattern in ("*.md", "docs/**/*.md", "containers/*.md") for path in ROOT.glob(pattern))


def documented_lines() -> list[str]:
    """What the documents show to be typed: lines of blocks, continued ones whole, and code inside the text."""
    lines = []
    for path in documents():
        text = path.read_text()
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
        shown = "\n".join(block for language, block in blocks if language in ("", "sh", "bash", "text"))
        lines += shown.replace("\\\n", " ").splitlines()
        lines += re.findall(r"--wrap '([^']+)'", shown.replace("\\\n", " "))
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [line.strip().replace("$SLURM_ARRAY_TASK_ID", "1") for line in lines]


def documented_commands() -> list[str]:
    known = ("python -m pipelines", "stillhouse ", "make ", "launchers/")
    lines = [line for line in documented_lines() if line.startswith(known)]
    return [line for line in lines if "=" in line or line.startswith("make ")]


def test_the_readme_has_commands() -> None:
    commands = documented_commands()
    assert "make quickstart" in " ".join(commands) and "make test" in " ".join(commands)
    assert any("stage=verify" in command for command in commands)


@pytest.mark.parametrize("command", documented_commands())
def test_every_command_of_the_readme_exists(command: str) -> None:
    if command.startswith("make "):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert shlex.split(command, comments=True)[1] in targets
    else:
        check_command(command)


def techniques() -> list[str]:
    """The settings of docs/techniques.md's table."""
    text = (ROOT / "docs" / "techniques.md").read_text()
    block = re.search(r"<!-- techniques -->\n(.*?)<!-- /techniques -->", text, re.S)
    assert block, "docs/techniques.md: no techniques"
    return re.findall(r"`([^`]+)`", block.group(1))


@pytest.mark.parametrize("settings", techniques())
def test_every_technique_composes_and_changes_the_quickstart(settings: str) -> None:
    usual = ["experiment=quickstart", "parallel=tp2", "parallel.device=cpu"]
    overrides = shlex.split(settings)
    config = compose([*usual, *overrides])
    assert config != compose(usual)
    if not any(override.startswith("model.path=") for override in overrides):  # a model that is given must be there
        assert validate(config, stage_names(config) if "stage=" in settings else [*PIPELINE, "plan"]) == []
        planning.plan(config)


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()) if "://" not in link]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_the_readme_names_every_stage() -> None:
    assert all(f"| `{name}` |" in README for name in STAGES)


def tree_of_the_readme() -> dict[str, str]:
    """{path: line} of the block that draws the tree; a name ending in / opens a directory."""
    block = re.search(r"<!-- tree -->\n```\w*\n(.*?)```", README, re.S)
    assert block, "README.md: no tree"
    paths: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in block.group(1).splitlines():
        indent = len(line) - len(line.lstrip())
        name, _, meaning = line.strip().partition("  ")
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = "".join(parent for _, parent in parents) + name
        if name.endswith("/"):
            parents.append((indent, name))
        paths[path] = meaning.strip()
    return paths


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = tree_of_the_readme()
    code = {str(path.relative_to(ROOT)) for path in modules() if path.stat().st_size}
    others = {f"conf/{group}/" for group in GROUPS} | {"conf/config.yaml", "Makefile", "setup.py", "pyproject.toml"}
    others |= {str(p.relative_to(ROOT)) for room in ("launchers", "containers") for p in (ROOT / room).iterdir()}
    assert (code | others) - tree.keys() == set(), "in the repository, not in README.md's tree"
    assert [path for path in tree if not (ROOT / path).exists()] == [], "in README.md's tree, not in the repository"
    assert [path for path, meaning in tree.items() if not meaning] == [], "without a line that says what it is"
