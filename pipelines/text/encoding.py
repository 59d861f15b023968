"""Chunks of text to token ids, in as many processes as wanted: the results come in the order of the chunks."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy
from tokenizers import Tokenizer

from pipelines.config import UserError
from pipelines.text import tokenizer
from pipelines.text.chunks import Chunk
from pipelines.text.splitting import Fractions

Array = numpy.ndarray[Any, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Encoded:
    """The documents of one chunk.

    ids: (tokens,), one document after the other, each with its end; lengths: (documents,) tokens; sides: (documents,)
    places in SPLITS; text_bytes: (documents,) UTF-8 bytes. byte_exact: the table of bytes per id sums to text_bytes.
    """

    ids: Array
    lengths: Array
    sides: Array
    text_bytes: Array
    input_size: int
    empty: int
    byte_exact: bool

    def first(self, documents: int) -> "Encoded":
        tokens = int(self.lengths[:documents].sum())
        share = self.text_bytes[:documents].sum() / max(self.text_bytes.sum(), 1)
        return Encoded(
            self.ids[:tokens],
            self.lengths[:documents],
            self.sides[:documents],
            self.text_bytes[:documents],
            round(self.input_size * share),
            self.empty,
            self.byte_exact,
        )


@dataclass
class Encoder:
    """Turns a chunk into ids. directory: of the tokenizer, opened in the process that encodes."""

    directory: Path
    fractions: Fractions
    end_of_document: int
    id_type: numpy.dtype[Any]
    token_bytes: Array | None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer.load(self.directory)

    def __call__(self, chunk: Chunk) -> Encoded:
        every = list(chunk.documents())
        texts = [text for text in every if text]
        content = [text.encode() for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts = [numpy.array([*e.ids, self.end_of_document], self.id_type) for e in encodings]
        ids = numpy.concatenate(parts) if parts else numpy.empty(0, self.id_type)
        text_bytes = numpy.array([len(data) for data in content], numpy.int64)
        exact = self.token_bytes is not None and int(self.token_bytes[ids].sum()) == int(text_bytes.sum())
        return Encoded(
            ids,
            numpy.array([len(part) for part in parts], numpy.int32),
            numpy.array([self.fractions.side(data) for data in content], numpy.uint8),
            text_bytes,
            chunk.size,
            len(every) - len(texts),
            exact,
        )


_work: Callable[[Any], Any]


def _start(work: Callable[[Any], Any], parent: int) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot end its workers: they look for it themselves."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(item: Any) -> Any:
    return _work(item)


def in_order(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """work(item) of every item, in their order, by `workers` processes; at most 3 items per worker are held."""
    if workers == 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (work, os.getpid()))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} tokenizing processes was ended from outside: expected them to live, the usual reason is "
            "too little memory. Set data.workers to a lower number."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
