"""The small corpus of the stages' tests, here too."""

from tests.stages.conftest import documents, jsonl, made  # noqa: F401
