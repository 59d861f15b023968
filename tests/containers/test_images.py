"""The Dockerfiles by our own rules, the versions they name against setup.py, and the scripts beside them.

No image is built here: it needs a Docker daemon and a registry.
"""

import ast
import fnmatch
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import secrets
from tests.test_house import check_command

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "containers" / "cpu.Dockerfile"]
ENROOT = ROOT / "containers" / "enroot.sh"
LACKING = ROOT / "containers" / "lacking.py"
WORDS = {"ARG", "FROM", "LABEL", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """(word, the rest) of each instruction, comments out and continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def of(file: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(file) if name == word]


def complaints(file: Path) -> list[str]:
    """What our rules find; hadolint's, as far as they matter here, and what it cannot know of this repository."""
    found = []
    steps = instructions(file)
    found += [f"{word}: not an instruction" for word, _ in steps if word not in WORDS]
    defined: set[str] = set()
    for place, (word, rest) in enumerate(steps):
        for name in re.findall(r"\$\{(\w+)", rest):
            if name not in defined:
                found.append(f"{name} is used before any ARG or ENV")
        if word == "ARG":
            name = rest.partition("=")[0]
            defined.add(name)
            later = " ".join(text for _, text in steps[place + 1 :])
            if f"${{{name}}}" not in later:
                found.append(f"ARG {name} is never used")
        if word == "ENV":
            defined |= set(re.findall(r"(\w+)=", rest))
    base = next((rest.partition("=")[2] for rest in of(file, "ARG") if rest.startswith("BASE=")), "")
    if not re.fullmatch(r"[\w./-]+:\d[\w.-]*", base) or of(file, "FROM") != ["${BASE}"]:
        found.append(f"base {base!r}: expected a tag that names a version, as a build argument")
    ignored = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.strip()]
    for copy in of(file, "COPY"):
        for source in copy.split()[:-1]:
            if not (ROOT / source).exists():
                found.append(f"COPY {source}: not in the repository")
            if any(fnmatch.fnmatch(source, pattern) for pattern in ignored):
                found.append(f"COPY {source}: left out by .dockerignore")
    users = of(file, "USER")
    if not users or users[-1] in ("root", "0"):
        found.append("runs as root")
    for run in of(file, "RUN"):
        for command in re.findall(r"pip install ([^&|;]+)", run):
            if "--no-cache-dir" not in command:
                found.append(f"pip keeps its cache: {command}")
            loose = [word for word in command.split() if re.fullmatch(r"[A-Za-z][\w.\[\]-]*", word) and "/" not in word]
            if loose:
                found.append(f"pip installs {loose} in whatever version there is")
        if re.search(r"\b(sudo|curl|wget|apt-get|chmod 777)\b", run):
            found.append(f"needs more than pip: {run}")
    labels = " ".join(of(file, "LABEL"))
    for key in ("title", "description", "version", "revision", "base.name"):
        if f"org.opencontainers.image.{key}=" not in labels:
            found.append(f"no label {key}")
    text = file.read_text()
    settable = re.findall(r"\b(\w+)(?:=|$)", "\n".join(of(file, "ARG") + of(file, "ENV")), re.M)
    if secrets.found_in(text, {}) or any(secrets.named_secret(name) for name in settable):
        found.append("holds a secret, or takes one as an argument, which the image would keep")
    if not any("stage=verify" in run for run in of(file, "RUN")):
        found.append("is not tried at its end")
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_dockerfile_follows_the_rules(file: Path) -> None:
    assert complaints(file) == []


BREACHES = {
    "runs as root": ("USER stillhouse", "USER root"),
    "COPY nowhere: not in the repository": ("COPY conf conf", "COPY nowhere conf"),
    "pip installs ['wandb'] in whatever version there is": ("pip install --no", "pip install wandb --no"),
    "ARG COMMIT is never used": ("${COMMIT}", "unknown"),
    "no label revision": ("image.revision", "image.commit"),
    "holds a secret, or takes one as an argument, which the image would keep": ("ARG VERSION", "ARG HF_TOKEN"),
    "is not tried at its end": ("stage=verify", "stage=plan"),
    "base 'nvcr.io/nvidia/nemo:latest': expected a tag that names a version, as a build argument": (
        "ARG BASE=nvcr.io/nvidia/nemo:25.11",
        "ARG BASE=nvcr.io/nvidia/nemo:latest",
    ),
}


@pytest.mark.parametrize("complaint", BREACHES)
def test_the_rules_find(tmp_path: Path, complaint: str) -> None:
    before, after = BREACHES[complaint]
    text = DOCKERFILES[0].read_text()
    assert before in text
    (tmp_path / "Dockerfile").write_text(text.replace(before, after))
    assert complaint in complaints(tmp_path / "Dockerfile")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_what_a_build_runs_is_shell_and_ours(file: Path) -> None:
    for run in of(file, "RUN"):
        subprocess.run(["bash", "-n", "-c", run], check=True)
        for command in re.findall(r"python -m pipelines [^&;|]+", run):
            check_command(command)
        for script in re.findall(r"python (containers/\S+)", run):
            assert (ROOT / script).is_file()


def required() -> dict[str, str]:
    """{name: version} of the pins of setup.py."""
    pinned = [r for r in ast.literal_eval(_requirements()) if "==" in r]
    return {re.split(r"[\[=]", r)[0]: r.split("==")[1].split(";")[0].strip() for r in pinned}


def _requirements() -> str:
    tree = ast.parse((ROOT / "setup.py").read_text())
    return next(ast.unparse(n.value) for n in tree.body if isinstance(n, ast.Assign) and "nemo" in ast.unparse(n.value))


def test_versions_are_the_same_everywhere() -> None:
    pins = required()
    for file in DOCKERFILES:
        for name, version in re.findall(r"([\w-]+)==([\d.]+)", " ".join(of(file, "RUN"))):
            assert pins[name] == version, f"{file.name}: {name}"
    constraints = {}
    for line in (ROOT / "containers" / "constraints.txt").read_text().splitlines():
        if "==" in line and not line.startswith("#"):
            name, _, rest = line.partition("==")
            constraints.setdefault(name.lower().replace("_", "-"), set()).add(rest.split(";")[0].strip())
    for name, version in pins.items():
        known = constraints.get(name.lower().replace("_", "-"))
        assert known is None or version in known, f"{name} in constraints.txt"
    assert constraints.keys() >= {"megatron-core", "nemo-toolkit", "transformers", "huggingface-hub"}
    matrix = (ROOT / "containers" / "README.md").read_text()
    ours = next(line for line in matrix.splitlines() if line.startswith("| `make`"))
    for name in ("torch", "nemo_toolkit", "megatron-core", "nvidia-modelopt"):
        assert f" {pins[name]} " in ours
    image = next(line for line in matrix.splitlines() if line.startswith("| [Dockerfile]"))
    base = next(rest.partition("=")[2] for rest in of(DOCKERFILES[0], "ARG") if rest.startswith("BASE="))
    assert f"`{base}`" in image and f" {pins['nemo_toolkit']} over " in image
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"megatron-core==([\d.]+)", makefile)[1] in image, "make test-image-versions tests the image's"  # type: ignore[index]


def lacking(path: Path | None = None, *, isolated: bool = False) -> "subprocess.CompletedProcess[str]":
    options = ["-I", "-S"] if isolated else []
    return subprocess.run([sys.executable, *options, LACKING], capture_output=True, text=True)


def test_nothing_is_lacking_where_everything_is_installed() -> None:
    done = lacking()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert re.search(r"hydra-core +setup.py ==1.3.2 +here 1.3.2", done.stderr)


def test_an_image_without_torch_ends_the_build() -> None:
    """Of a Python without any package everything is lacking; what the image must bring is not fetched."""
    done = lacking(isolated=True)
    assert done.returncode == 1 and "torch: expected in the base image, found none" in done.stderr
    assert "hydra-core==1.3.2" in done.stdout.splitlines() and "torch" not in done.stdout.replace("torchmetrics", "")
    assert sum(line.startswith("tensorstore==") for line in done.stdout.splitlines()) == 1, "one for this Python"


def enroot(*arguments: str, path: Path | None = None) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    return subprocess.run([ENROOT, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["stillhouse"], "enroot import --output stillhouse.sqsh.partial dockerd://stillhouse"),
        (["stillhouse:cpu"], "enroot import --output stillhouse-cpu.sqsh.partial dockerd://stillhouse:cpu"),
        (["team/stillhouse:1", "/x/y.sqsh"], "enroot import --output /x/y.sqsh.partial dockerd://team/stillhouse:1"),
        (
            ["nvcr.io/team/stillhouse:1", "a b.sqsh"],
            "enroot import --output 'a b.sqsh.partial' 'docker://nvcr.io#team/stillhouse:1'",
        ),
        (["host:5000/s:1"], "enroot import --output s-1.sqsh.partial 'docker://host:5000#s:1'"),
    ],
)
def test_enroot_imports_from_docker_and_from_registries(tmp_path: Path, arguments: list[str], command: str) -> None:
    done = enroot("--dry-run", *arguments)
    assert done.returncode == 0 and shlex.split(done.stdout) == shlex.split(command)


def test_enroot_makes_a_whole_file_or_none(tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "enroot"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\n[ "$1 $2" = "import --output" ] || exit 9\necho "$4" > "$3"; exit ${FAILS:-0}\n')
    stand_in.chmod(0o755)
    output = tmp_path / "image.sqsh"
    assert enroot("stillhouse:latest", str(output), path=stand_in.parent).returncode == 0
    assert output.read_text() == "dockerd://stillhouse:latest\n"
    assert "expected no such file yet" in enroot("stillhouse", str(output), path=stand_in.parent).stderr
    stand_in.write_text(stand_in.read_text().replace("${FAILS:-0}", "4"))
    other = tmp_path / "other.sqsh"
    assert enroot("stillhouse", str(other), path=stand_in.parent).returncode == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "image.sqsh"]


@pytest.mark.parametrize("arguments", [[], ["a", "b.sqsh", "c"], ["--force", "a"], ["a", "b.img"]])
def test_enroot_says_what_is_wrong(arguments: list[str]) -> None:
    done = enroot(*arguments)
    assert done.returncode == 2 and "expected" in done.stderr


def test_shell_scripts_parse() -> None:
    for script in (*(ROOT / "containers").glob("*.sh"), *(ROOT / "launchers").glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK), f"{script}: not executable"


DOCKER_RUN = {"--rm", "--gpus", "--ipc", "--ulimit", "-v", "--user", "-e", "--entrypoint"}
BUILDS = {"-t", "--build-arg", "-f"}


def documented(program: str) -> list[list[str]]:
    """The command lines of a program in the pages and Dockerfiles."""
    pages = [
        ROOT / "README.md",
        ROOT / "containers" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *DOCKERFILES,
    ]
    found = []
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        lines = [line.lstrip("# ").strip() for line in text.splitlines()]
        found += [shlex.split(line, comments=True) for line in lines if line.startswith(program + " ")]
    return found


def test_documented_docker_commands_are_of_this_image() -> None:
    runs, builds = documented("docker run"), documented("docker build")
    names = {words[words.index("-t") + 1] for words in builds}
    assert names == {"stillhouse", "stillhouse:cpu"} and len(runs) >= 3
    for words in builds:
        assert {word for word in words if word.startswith("-")} <= BUILDS and words[-1] == "."
        file = ROOT / (words[words.index("-f") + 1] if "-f" in words else "Dockerfile")
        given = [
            word.partition("=")[0] for before, word in zip(words, words[1:], strict=False) if before == "--build-arg"
        ]
        assert set(given) <= {rest.partition("=")[0] for rest in of(file, "ARG")}
    for words in runs:
        image = next(place for place, word in enumerate(words) if word in names)
        flags = {word.partition("=")[0] for word in words[2:image] if word.startswith("-")}
        assert flags <= DOCKER_RUN, f"{words}: {flags - DOCKER_RUN}"
        assert "stillhouse:cpu" in words or {"--gpus", "--ipc"} <= flags
        if "--entrypoint" not in words:
            check_command(shlex.join(words[image + 1 :]))


def test_documented_enroot_commands_start_what_enroot_sh_makes() -> None:
    starts = documented("enroot start")
    assert starts
    for words in starts:
        assert any(word.endswith(".sqsh") for word in words)
        place = words.index("pipelines") if "pipelines" in words else None
        assert place is not None and words[place - 2 : place] == ["python", "-m"]
        check_command(shlex.join(words[place + 1 :]))
