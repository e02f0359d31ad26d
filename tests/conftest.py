"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest
from _pytest.config import parse_warning_filter

from tests.parallel.pool import Ranks


@pytest.fixture(scope="session")
def _session_ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(_session_ranks: Ranks, request: pytest.FixtureRequest) -> Ranks:
    """Worker processes: ``ranks.run(fn, world_size, *args)`` calls ``fn`` on every rank.

    What warnings are there is decided as for the test itself: by pyproject.toml, then by its marks.
    """
    lines: list[str] = list(request.config.getini("filterwarnings"))
    # The mark that is closest to the test comes last, which is the one that wins.
    for mark in reversed(list(request.node.iter_markers("filterwarnings"))):
        lines += mark.args
    _session_ranks.filters = tuple(parse_warning_filter(line, escape=False) for line in lines)
    return _session_ranks
