"""The order of results and the number of items in memory, with one process and with several."""

import os
import signal
import time

import pytest

from pipelines.config import UserError
from pipelines.text.encoding import in_order


def work(item: int) -> int:
    if item == 666:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 13:
        raise UserError("item 13 is bad")
    time.sleep(0.02 if item % 2 else 0)
    return item * item


@pytest.mark.parametrize("workers", [1, 2])
def test_ordered_and_bounded(workers):
    drawn = 0

    def items():
        nonlocal drawn
        for item in range(100, 140):
            drawn += 1
            yield item

    for done, result in enumerate(in_order(work, items(), workers)):
        assert result == (100 + done) ** 2
        assert drawn - done <= 3 * workers
    assert done == 39


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_error_arrives_as_it_is(workers):
    with pytest.raises(UserError, match="^item 13 is bad$"):
        list(in_order(work, iter(range(20)), workers))


def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(UserError, match="one of 2 tokenizing processes was ended from outside"):
        list(in_order(work, iter([1, 666, 2]), 2))
