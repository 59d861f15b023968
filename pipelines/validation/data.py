"""The corpus: sources, tokenizer, and the splits that later stages read."""

import glob
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from pipelines import artifacts, index_header, scores_origin
from pipelines.config import (
    Config,
    SourceConfig,
    SourceKind,
    TeacherMode,
    distils_candidates,
    expect,
    searches,
)
from pipelines.families import ModelShape
from pipelines.nemo_context import tokenizer_directories
from pipelines.vocabulary import TOKENIZERS, check_vocabulary, read_blend, tokenizer_size

HELD_OUT = ("validation", "test", "calibration")
SPLITS = ("train", *HELD_OUT)
SMALLEST_VOCABULARY = 258  # of a byte-level BPE: 256 bytes and two special tokens


def makes_corpus(config: Config, stages: Collection[str]) -> bool:
    return bool({"corpus", "tokenize"} & set(stages)) and not config.data.corpus


def check_sources(config: Config, stages: Collection[str]) -> None:
    data = config.data
    known = ", ".join(SPLITS)
    expect(config.evaluate.split in SPLITS, "evaluate.split", f"one of {known}", config.evaluate.split, "Name one.")
    total = sum(getattr(data, f"{name}_fraction") for name in HELD_OUT)
    expected = "validation, test and calibration fractions to leave some for training"
    expect(total < 1, "data", expected, f"{total:g} in all", "Lower them.")
    if not makes_corpus(config, stages):
        return
    remedy = "Use data=standard_library, or data=files 'data.sources=[{path: text.jsonl}]'."
    expect(bool(data.sources), "data.sources", "one or more sources", "none", remedy)
    for number, source in enumerate(data.sources):
        _check_source(f"data.sources[{number}]", source)
    _check_once(data.sources)
    _check_parts(config, stages)


def _check_once(sources: Sequence[SourceConfig]) -> None:
    """No text twice: it would be in the corpus twice, and on two sides of the split. A directory counts as one."""
    seen: dict[tuple[str, str], int] = {}
    for number, source in enumerate(sources):
        files = artifacts.source_paths(source.path) if source.path else []
        texts = [(str(path.resolve()), source.text_key) for path in files] or [(source.kind.value, "")]
        for text in texts:
            remedy = "Leave one out; weight=2 draws it twice as often."
            found = f"{text[0]} again, as data.sources[{seen.get(text)}]"
            expect(text not in seen, f"data.sources[{number}]", "each source once", found, remedy)
        seen |= dict.fromkeys(texts, number)


def _check_parts(config: Config, stages: Collection[str]) -> None:
    data, alone = config.data, "stage=tokenize, which makes one part"
    if "tokenize" in stages:
        expect(data.parts is not None, "data.parts", "the number of parts", "none", "Set data.parts=64, as an example.")
        expect(data.part is not None, "data.part", f"a number from 1 to data.parts={data.parts}", "none", "Set it.")
        assert data.part is not None and data.parts is not None
        expect(data.part <= data.parts, "data.part", f"at most data.parts={data.parts}", data.part, "Lower it.")
    else:
        expect(data.part is None, "data.part", f"none without {alone}", data.part, "Leave it out, or set stage.")
    if data.parts is not None:
        remedy = "Set data.tokenizer: one that is trained here needs the whole text in one process."
        expect(given_tokenizer(config) is not None, "data.parts", "a tokenizer that is given", "none", remedy)


def _check_source(setting: str, source: SourceConfig) -> None:
    kind = source.kind
    if kind in (SourceKind.standard_library, SourceKind.package_descriptions):
        expect(source.path is None, f"{setting}.path", f"none with kind={kind.value}", source.path, "Drop one.")
        return
    expect(bool(source.path), f"{setting}.path", "a path", "none", "Give the file or directory.")
    path = Path(str(source.path))
    prefix = path.with_name(path.name + ".idx").is_file() and path.with_name(path.name + ".bin").is_file()
    if kind is SourceKind.datasets:
        described = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
        expect(
            described, f"{setting}.path", "a directory of datasets' save_to_disk", path, "Check the path or the kind."
        )
    if kind is SourceKind.megatron:
        base = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        both = all(base.with_name(base.name + ending).is_file() for ending in (".bin", ".idx"))
        remedy = "Give the prefix without an ending, with both files beside each other."
        expect(both, f"{setting}.path", "the prefix of a Megatron data set's .bin and .idx", path, remedy)
    there = path.exists() or prefix or next(glob.iglob(str(path), recursive=True), None) is not None
    expect(there, f"{setting}.path", "an existing path", path, "Check its spelling.")


def given_tokenizer(config: Config) -> tuple[str, Path] | None:
    """(setting, directory) of the tokenizer that the corpus takes; None where a BPE is trained."""
    if config.data.tokenizer:
        return "data.tokenizer", Path(config.data.tokenizer)
    path = config.model.path
    if not path or config.teacher.mode is TeacherMode.pretrain:
        return None
    places = (Path(path), *tokenizer_directories(Path(path)))
    return "model.path", next((p for p in places if any((p / name).is_file() for name in TOKENIZERS)), Path(path))


def check_tokenizer(config: Config, stages: Collection[str], teacher: ModelShape, where: str) -> None:
    """Ids of the tokenizer against rows of the embedding, read from tokenizer.json alone. where: the teacher."""
    if not makes_corpus(config, stages):
        return
    rows = f"at most the {teacher.vocab_size} rows of embedding of {where}"
    taken = given_tokenizer(config)
    if taken is None:
        trained = config.data.tokenizer_vocab_size
        setting = "model.shape.vocab_size" if trained is None else "data.tokenizer_vocab_size"
        size = teacher.vocab_size if trained is None else trained
        remedy = f"Lower it, or raise model.shape.vocab_size={teacher.vocab_size}."
        expect(size <= teacher.vocab_size, setting, rows, size, remedy)
        enough = f"at least {SMALLEST_VOCABULARY}: 256 bytes and two special tokens"
        expect(size >= SMALLEST_VOCABULARY, setting, enough, size, "Raise it.")
        return
    setting, directory = taken
    expect(
        any((directory / name).is_file() for name in TOKENIZERS),
        setting,
        "a tokenizer (tokenizer.json)" + (" beside the teacher's weights" if setting == "model.path" else ""),
        f"none in {directory}",
        "Set data.tokenizer to its directory: a tokenizer trained here would not fit a trained teacher.",
    )
    ids = tokenizer_size(directory)
    if ids is not None:
        remedy = "Take the teacher's own tokenizer." if setting == "data.tokenizer" else "Its files are of two models."
        expect(ids <= teacher.vocab_size, setting, rows, f"{ids} ids in {directory}", remedy)


def needed_splits(config: Config, stages: Collection[str], teacher: ModelShape) -> Iterator[tuple[str, str]]:
    """(stage, split) of what the stages read of the corpus."""
    for name in ("teacher", "distil"):
        if name in stages and not (name == "teacher" and config.teacher.mode is TeacherMode.take):
            yield name, "train"
            yield name, "validation"
    if "prune" in stages and not config.student.path and scores_origin.reads_calibration(config, teacher):
        yield "prune", "calibration"
    if "prune" in stages and searches(config):
        yield "prune", "validation"
        if distils_candidates(config):
            yield "prune", "train"
    for name in ("evaluate", "export"):
        if name in stages:
            yield name, config.evaluate.split


def check_splits(config: Config, stages: Collection[str], teacher: ModelShape) -> None:
    """That the corpus has, or will have, every split that the stages read, and the teacher's vocabulary."""
    if makes_corpus(config, stages):
        for name, split in needed_splits(config, stages, teacher):
            if split != "train" and not getattr(config.data, f"{split}_fraction"):
                remedy = "Raise it" + (", or set evaluate.split." if name in ("evaluate", "export") else ".")
                expected = f"above 0, since stage {name} reads the {split} split"
                expect(False, f"data.{split}_fraction", expected, 0, remedy)
        return
    corpus = artifacts.corpus_directory(config)
    needed = list(needed_splits(config, stages, teacher))
    if not needed or not (corpus / "blend.json").is_file():
        return  # artifacts says what is missing
    splits = read_blend(corpus)["splits"]
    filled = ", ".join(name for name, parts in splits.items() if parts)
    for name, split in needed:
        remedy = f"Make the corpus with data.{split}_fraction above 0" + (
            ", or set evaluate.split." if name in ("evaluate", "export") else "."
        )
        expect(bool(splits.get(split)), str(corpus), f"the {split} split, which stage {name} reads", filled, remedy)
        _check_files(corpus, splits[split])
        if name == "prune":
            _check_samples(config, corpus, splits[split])
    models = [artifacts.teacher_directory(config)] if {"teacher", "prune", "distil", "evaluate"} & set(stages) else []
    if config.student.path and "distil" in stages:  # of evaluate, a gap
        models.append(Path(config.student.path))
    for directory in filter(artifacts.is_hugging_face, models):
        check_vocabulary(corpus, directory, teacher.vocab_size)


def _check_files(corpus: Path, parts: object) -> None:
    """The two files of each data set of a split."""
    remedy = "Copy the corpus again, or make it again with stage=corpus."
    good = isinstance(parts, list) and all(isinstance(part, dict) and part.get("prefix") for part in parts)
    expect(good, str(corpus / "blend.json"), "the prefix of each data set", "none", remedy)
    assert isinstance(parts, list)
    for part in parts:
        for ending in (".bin", ".idx"):
            file = f"{part['prefix']}{ending}"
            expect((corpus / file).is_file(), str(corpus), f"the file {file}", "none", remedy)


def _check_samples(config: Config, corpus: Path, parts: Sequence[dict[str, str]]) -> None:
    """Windows of the calibration split, by the indices of its data sets, against those that prune takes."""
    tokens = sum(index_header.tokens(corpus / f"{part['prefix']}.idx") for part in parts)
    wanted, length = config.prune.calibration_samples, config.prune.sequence_length
    found = -(-(tokens - 1) // length) if tokens else 0
    remedy = (
        "Lower prune.calibration_samples or prune.sequence_length, or make a corpus with more text or a larger "
        "data.calibration_fraction."
    )
    expected = f"{wanted} sequences of {length} tokens in the calibration split of {corpus}"
    expect(found >= wanted, "prune.calibration_samples", expected, found, remedy)
