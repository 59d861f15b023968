"""Which side of the corpus a document stands on: decided by its content alone, so that equal documents never part."""

import hashlib
from dataclasses import dataclass

from pipelines.config import UserError

SPLITS = ("train", "validation", "test", "calibration")


@dataclass(frozen=True)
class Fractions:
    """The expected share of the documents on each side; train takes the rest."""

    validation: float
    test: float
    calibration: float

    def __post_init__(self) -> None:
        shares = (self.validation, self.test, self.calibration)
        if min(shares) < 0 or sum(shares) >= 1:
            raise UserError(
                "data.validation_fraction + data.test_fraction + data.calibration_fraction: expected three numbers of "
                f"0 or more with a sum below 1, since train takes the rest; found {shares}."
            )

    def side(self, content: bytes) -> int:
        """The place in SPLITS of a document. It depends on neither seed, source, order nor number of documents."""
        position = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
        for side, share in ((1, self.validation), (2, self.test), (3, self.calibration)):
            if position < share:
                return side
            position -= share
        return 0
