"""The directories that a configuration names: that they are there, and hold what they should."""

import re
from collections.abc import Collection
from pathlib import Path

from pipelines import artifacts
from pipelines.config import Config, TeacherMode, expect
from pipelines.families import read_shape
from pipelines.nemo_context import WEIGHTS, is_nemo_checkpoint, looks_like_nemo
from pipelines.safetensors_header import check_model
from pipelines.vocabulary import TOKENIZERS

NEEDS_TEACHER = frozenset({"teacher", "prune", "distil", "evaluate"})


def check_run(config: Config, stages: Collection[str]) -> None:
    """Where the run is written."""
    name = re.sub(r"/step[1-9]\d*$", "", config.run.name)  # of a run in steps (iteration.py)
    good = name.strip() and name not in (".", "..") and not set(name) & set("/\\\0")
    expect(bool(good), "run.name", "a directory name", repr(name), "Leave slashes out; see run.directory.")
    size = len(name.encode())
    expect(size < 256, "run.name", "a directory name of at most 255 bytes", f"{size}", "Shorten it.")
    expect("\0" not in config.run.directory, "run.directory", "a path", repr(config.run.directory), "Change it.")
    for place in [artifacts.stage_directory(config, stage).absolute() for stage in stages]:
        existing = next(path for path in (place, *place.parents) if path.exists())
        remedy = "Choose another path, or another run.name."
        expect(existing.is_dir(), "run.directory", "a directory", f"the file {existing}", remedy)


def check_given(config: Config, stages: Collection[str]) -> None:
    """Directories that the configuration names. Without any stage that reads them they may be missing."""
    path = config.model.path
    works = [name for name in stages if name not in ("plan", "verify", "fetch", "accept", "decide")]
    pretrains = config.teacher.mode is TeacherMode.pretrain
    if path and works:
        _expect_directory("model.path", path)
        hugging_face = artifacts.is_hugging_face(path)
        expect(
            hugging_face or looks_like_nemo(Path(path)),
            "model.path",
            "a Hugging Face directory with a config.json, or a NeMo 2 checkpoint",
            path,
            "Point to the model itself.",
        )
        expect(
            hugging_face or is_nemo_checkpoint(Path(path)),
            "model.path",
            "a NeMo 2 checkpoint with context/model.yaml and weights/",
            f"only one of them in {path}",
            "Copy the checkpoint again, or convert it to Hugging Face.",
        )
        metadata = Path(path) / WEIGHTS / "metadata.json"
        expect(hugging_face or metadata.is_file(), "model.path", str(metadata), "none", "Copy the checkpoint again.")
    made = artifacts.is_complete(artifacts.stage_directory(config, "teacher"))
    expect(
        bool(path) or pretrains or not NEEDS_TEACHER & set(stages) or made,
        "model.path",
        f"the teacher's directory with teacher.mode={config.teacher.mode.value}",
        "none",
        "Set model.path=..., or teacher=pretrain for a small teacher from scratch.",
    )
    for setting, given, names in (
        ("student.path", config.student.path, ("config.json",)),
        ("data.corpus", config.data.corpus, ("blend.json",)),
        ("data.tokenizer", config.data.tokenizer, TOKENIZERS),
    ):
        if given and works:
            _expect_directory(setting, given)
            there = any((Path(given) / name).is_file() for name in names)
            expect(there, setting, f"a directory with {' or '.join(names)}", given, "Check the path.")


def check_kept(config: Config, stages: Collection[str]) -> None:
    """export.step, which names a checkpoint of distil."""
    if not config.export.step:
        return
    remedy = "Leave export.step out of other stages."
    expect(set(stages) == {"export"}, "export.step", "stage=export by itself", ", ".join(sorted(stages)), remedy)
    checkpoint = artifacts.kept_checkpoint(config)
    made = artifacts.is_complete(artifacts.stage_directory(config, "export"))
    kept = sorted(int(path.name[5:]) for path in checkpoint.parent.glob("step-*"))
    there = f"those of {', '.join(map(str, kept))}" if kept else "none"
    expected = f"a step whose checkpoint is in {checkpoint.parent}"
    remedy = "Choose one of them." if kept else "Run stage=distil first."
    expect(made or checkpoint.is_dir(), f"export.step={config.export.step}", expected, there, remedy)


def _expect_directory(setting: str, given: str) -> None:
    path = Path(given)
    remote = ""
    if setting in ("model.path", "student.path"):
        known = re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not path.parent.exists()
        name = given if known else "owner/model"
        remote = f" stage=fetch fetch.models=[{name}] gets one from the Hub, where there is network."
    expect(path.exists(), setting, "an existing directory", given, f"Check its spelling.{remote}")
    expect(path.is_dir(), setting, "an existing directory", f"the file {given}", "Give the directory that it is in.")


def warnings(config: Config, stages: Collection[str]) -> list[str]:
    """What only the user can know of a directory that is given."""
    path = config.model.path
    pretrains = config.teacher.mode is TeacherMode.pretrain
    if not path or pretrains or "teacher" not in stages or artifacts.is_hugging_face(path):
        return []
    return [
        f"model.path={path} is a NeMo 2 checkpoint, whose {WEIGHTS}/common.pt is a pickle, which can run any code: go "
        "on only if you trust where it comes from, or give the model in safetensors"
    ]


def check_weights(config: Config, stages: Collection[str]) -> None:
    """The safetensors headers of given models against their config.json; no weight is read."""
    given = []
    path = config.model.path
    if path and config.teacher.mode is not TeacherMode.pretrain and NEEDS_TEACHER & set(stages):
        given.append(path)
    if config.student.path and "distil" in stages:  # of evaluate, a gap
        given.append(config.student.path)
    for directory in given:
        if artifacts.is_hugging_face(directory):
            check_model(Path(directory), read_shape(directory))
