"""The teacher stage before its training."""

from pathlib import Path

from tests.ranks import RankPools


def test_ranks_meet_equally_often_whoever_is_late(ranks: RankPools, tmp_path: Path) -> None:
    """A rank that sees what another has just written, and so skips a collective, leaves the other in it for ever."""
    case = "tests.stages.cases_teacher:start"
    first, second = ranks(2, case, directory=str(tmp_path), late=1)
    assert first == second == 1 and (tmp_path / "start" / "config.json").is_file()
