"""One part of a corpus: the share data.part of data.parts of the sources' files, each into data sets of its own.

For job arrays: parts run at the same time on any machines, and know nothing of each other. A part that is started again
does what is left of its files. `stage=corpus data.parts=N` puts the parts together. No torch.
"""

import os
from typing import Any

from pipelines import console
from pipelines.artifacts import StageContext
from pipelines.files import new_directory
from pipelines.lock import Lock
from pipelines.text import indexed, parts, tokenizer
from pipelines.text.encoding import Encoder
from pipelines.text.splitting import Fractions
from pipelines.text.writing import Speed
from pipelines.validation.data import given_tokenizer


def run(context: StageContext) -> dict[str, Any]:
    """Returns the files of this part, how many of them were tokenized now, and their tokens."""
    data, directory = context.config.data, context.directory
    assert data.part is not None and data.parts is not None, "validation has seen to it"
    given = given_tokenizer(context.config)
    assert given is not None, "validation has seen to it"
    own = directory / f"part-{data.part:05d}-of-{data.parts:05d}"
    own.mkdir(parents=True, exist_ok=True)
    lock = Lock(own / "lock", console.say)
    try:
        with new_directory(own / "tokenizer") as building:
            tokenizer.take(given[1], building)
        vocabulary = tokenizer.read_vocabulary(own / "tokenizer")
        fractions = Fractions(data.validation_fraction, data.test_fraction, data.calibration_fraction)
        ids = indexed.id_type(vocabulary.size)
        encoder = Encoder(own / "tokenizer", fractions, vocabulary.end_of_document, ids, vocabulary.token_bytes)
        workers = data.workers if data.workers is not None else len(os.sched_getaffinity(0))
        files = parts.share(parts.files_of(data), data.part, data.parts)
        left = [file for file in files if not parts.is_made(file, directory, encoder)]
        size = sum(file.path.stat().st_size for file in left)
        done, name = len(files) - len(left), f"tokenize  part {data.part} of {data.parts}"
        console.say(f"{name}: {len(files)} files, {done} done already")
        with console.progress(name, size / 1e6, "MB") as bar:
            speed = Speed(bar, 1e6)
            for file in left:
                parts.make(file, directory, encoder, vocabulary.size, workers, speed)
        held = [parts.read(file, directory) for file in files]
    finally:
        lock.release()
    tokens = sum(count.tokens for counts in held for count in counts.splits.values())
    console.say(f"{name}: {tokens:,} tokens in {len(files)} files")
    return {"part": data.part, "parts": data.parts, "files": len(files), "tokenized": len(left), "tokens": tokens}
