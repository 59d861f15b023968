"""A run's directory with a real corpus of a few kilobytes and three random models, for evaluate and export."""

from pathlib import Path
from typing import Any

import numpy as np

from pipelines import artifacts, files
from pipelines.artifacts import StageContext
from pipelines.config import Config, SourceConfig
from pipelines.families import ModelShape
from pipelines.model.random_model import write_random_model
from pipelines.stages import corpus

VOCABULARY = 301  # odd: the second of two shards ends in padding
TEACHER = ModelShape(VOCABULARY, 32, 48, 2, 4, 2, 8)
STUDENT = TEACHER.replace(hidden_size=16, intermediate_size=24)
WORDS = ("def", "return", "self", "value", "naïve", "über", "数", "for", "in", "range", "list", "yield", "class")


def configure(root: Path, **settings: Any) -> Config:
    """settings: "evaluate__batches", "evaluate__tasks__names" and the like on top of small sizes."""
    config = Config()
    config.run.directory, config.run.name = str(root), "small"
    config.parallel.processes, config.parallel.tensor = None, 1
    config.data.sources = [SourceConfig(path=str(root / "text"))]
    config.data.workers, config.data.tokenizer_vocab_size = 1, VOCABULARY
    config.data.validation_fraction = config.data.calibration_fraction = config.data.test_fraction = 0.2
    config.evaluate.sequence_length, config.evaluate.micro_batch_size = 16, 5
    config.evaluate.efficiency.batch_sizes = []
    config.export.new_tokens = 5
    for name, value in settings.items():
        *groups, key = name.split("__")
        place: Any = config
        for group in groups:
            place = getattr(place, group)
        assert hasattr(place, key)
        setattr(place, key, value)
    return config


def write_small_run(root: Path) -> Path:
    """Corpus, teacher, pruned and student under root/small. Returns root."""
    random = np.random.default_rng(3)
    (root / "text").mkdir(parents=True)
    for number in range(40):
        (root / "text" / f"{number}.txt").write_text(" ".join(random.choice(WORDS, 30)) + "\n")
    config = configure(root)
    stage = artifacts.stage_directory(config, "corpus")
    stage.mkdir(parents=True)
    corpus.run(StageContext(config, "corpus", stage))
    for seed, (name, shape) in enumerate((("teacher", TEACHER), ("prune", STUDENT), ("distil", STUDENT))):
        directory = artifacts.stage_directory(config, name)
        write_random_model(directory / "hf", shape, seed, std=0.3, tokenizer=stage / "tokenizer")
        outputs = files.fingerprint(directory, root / ".hashes")
        files.write_json(directory / "manifest.json", {"stage": name, "outputs": outputs, "inputs": {}})
        (directory / artifacts.COMPLETE).touch()
    return root


def ids_of_test_split(root: Path) -> np.ndarray:
    """The token ids of the test split as the .bin files hold them, one data set behind the other."""
    found = sorted((root / "small" / "corpus" / "data" / "test").glob("*.bin"))
    return np.concatenate([np.fromfile(file, np.uint16) for file in found]).astype(np.int64)
