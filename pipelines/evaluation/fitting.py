"""Which models can be held to the teacher token by token, and why another one cannot. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.config import Layout, UserError
from pipelines.families import ModelShape, read_shape
from pipelines.safetensors_header import check_model
from pipelines.validation.layouts import check_division
from pipelines.vocabulary import OtherVocabulary, check_vocabulary

TEACHER = "teacher"
STILL = "What needs no token of the teacher's is measured all the same: tasks, text, behaviour, efficiency."


@dataclass(frozen=True)
class Fitting:
    """shapes: of the models that are measured as shards, beside the teacher. whole: directories of those that
    transformers may open, with the tokenizer of their own. reasons: by model, why it is not among the first."""

    shapes: dict[str, ModelShape]
    whole: dict[str, Path]
    reasons: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"whole": {name: str(path) for name, path in self.whole.items()}}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Fitting":
        shapes = {name: ModelShape(**shape) for name, shape in found["shapes"].items()}
        return cls(shapes, {name: Path(path) for name, path in found["whole"].items()}, found["reasons"])


def fitting(corpus: Path, directories: Mapping[str, Path], ranks: Layout) -> Fitting:
    """directories: by name, the teacher's first. Reads headers and tokenizers. Raises UserError for the teacher, as
    nothing can be told without it, and for a model that the layout does not divide: that is a mistake in settings."""
    found = Fitting({}, {}, {})
    for name, directory in directories.items():
        try:
            shape = _checked(name, corpus, directory, found.shapes.get(TEACHER))
        except UserError as error:
            if name == TEACHER:
                raise
            found.reasons[name] = f"{error} {STILL}"
        else:
            check_division(ranks, shape, name)
            try:
                check_model(directory, shape)
            except UserError as error:
                if name == TEACHER:
                    raise
                found.reasons[name] = str(error)
                continue
            found.shapes[name] = shape
        found.whole[name] = directory
    return found


def _checked(name: str, corpus: Path, directory: Path, teacher: ModelShape | None) -> ModelShape:
    """A model's shape. Raises UserError where its tokens are others than the teacher's, or cannot be read."""
    shape = read_shape(directory)
    if teacher is None:
        check_vocabulary(corpus, directory, shape.vocab_size)
    elif shape.vocab_size != teacher.vocab_size:
        raise UserError(
            f"{directory}: expected the teacher's vocabulary of {teacher.vocab_size} ids, found {shape.vocab_size}. "
            f"Losses per token and KL compare the same tokens: give a {name} of this teacher."
        )
    else:
        try:
            check_vocabulary(corpus, directory, shape.vocab_size)
        except OtherVocabulary:
            raise UserError(
                f"{directory}: expected the teacher's tokenizer, found another one. Losses per token and KL compare "
                f"the same tokens: give a {name} of this teacher."
            ) from None
    return shape
