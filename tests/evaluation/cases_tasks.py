"""Runs on the pool of ranks: our own accuracy in a file of questions; the tasks of an evaluation without its stage."""

from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.evaluation import tasks
from pipelines.evaluation.parts import Pieces
from pipelines.evaluation.sharing import Models
from pipelines.families import read_shape
from pipelines.model import parallel
from pipelines.model.build import build_model
from pipelines.model.tasks import log_likelihoods
from pipelines.model.weights import load_hugging_face
from pipelines.questions import read_questions, score
from pipelines.text.multiple_choice import encode


def accuracy(directory: str, questions: str) -> list[float]:
    """[accuracy, normalised accuracy] at TP 2."""
    parallel.initialize(2)
    place, shape = Path(directory), read_shape(directory)
    model = build_model(shape)
    load_hugging_face(model, place, shape)
    asked = read_questions(questions)
    rows = encode(asked, place, shape.vocab_size, 512)
    found = score(asked, log_likelihoods(model, rows, vocab_size=shape.vocab_size, tokens_per_pass=512))
    return [found.accuracy, found.normalised]


def measure(directories: dict[str, str], corpus: str, names: list[str], **settings: Any) -> dict[str, Any]:
    parallel.initialize(1)
    config = Config()
    config.evaluate.tasks.names = names
    for name, value in settings.items():
        setattr(config.evaluate.tasks, name, value)
    places = {name: Path(place) for name, place in directories.items()}
    models = Models(places, Path(corpus), "fp32", "cpu")
    return tasks.measure(config, models, Pieces(Path(corpus) / "pieces", None), Path(corpus) / "evaluate")
