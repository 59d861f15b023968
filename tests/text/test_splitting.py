import pytest

from pipelines.config import UserError
from pipelines.text.splitting import SPLITS, Fractions


def test_shares_and_stability():
    contents = [f"document {n}".encode() for n in range(20_000)]
    fractions = Fractions(0.1, 0.05, 0.2)
    sides = [fractions.side(c) for c in contents]
    shares = [sides.count(n) / len(sides) for n in range(len(SPLITS))]
    assert shares == pytest.approx([0.65, 0.1, 0.05, 0.2], abs=0.01)
    assert sides[:12] == [fractions.side(c) for c in contents[:12]]
    # a document stays where it is when the others' share changes, here of what comes behind validation
    other = Fractions(0.1, 0.5, 0.0)
    assert [other.side(c) == 1 for c in contents] == [side == 1 for side in sides]
    assert set(map(Fractions(0, 0, 0).side, contents)) == {0}


def test_pinned():
    """Where a document stands must not change between versions: a model would be tested on what it was trained on."""
    fractions = Fractions(0.25, 0.25, 0.25)
    assert [fractions.side(text) for text in (b"", b"a", b"b", b"c", b"d", b"e")] == [0, 2, 3, 1, 3, 1]


@pytest.mark.parametrize("values", [(0.5, 0.3, 0.2), (-0.1, 0, 0), (1, 0, 0)])
def test_refuses_shares_that_leave_nothing_to_train(values):
    with pytest.raises(UserError, match="data.validation_fraction.*sum below 1"):
        Fractions(*values)
