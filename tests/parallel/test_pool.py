"""Worker processes of distributed tests: results, failures of every kind, and life after them."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.pool import RankError, Ranks, mesh_of, missing_modules
from trimtab.parallel.mesh import Degrees

ROOT = Path(__file__).parents[2]


def gathered(offset: int) -> list[int]:
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, dist.get_rank() + offset)
    return parts


def own_rank() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(0.2)  # its peer fails first, as peers do whose connection is lost
        os.kill(os.getpid(), signal.SIGKILL)
    raise ConnectionError("closed by peer")


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def warn() -> None:
    warnings.warn("of this", stacklevel=1)


def same_mesh() -> tuple[bool, int, int]:
    mesh = mesh_of(Degrees(dp_shard=1, tp=2))
    return mesh is mesh_of(Degrees(tp=2)), mesh.rank("tp"), torch.get_num_threads()


def draw() -> tuple[float, Any]:
    return torch.rand(()).item(), torch.ones(2, dtype=torch.float64) * dist.get_rank()


def unpicklable() -> Any:
    return lambda: None


@pytest.fixture
def alive(ranks: Ranks) -> Any:
    """After the test the pool must work, in new processes if it failed."""
    ranks.run(own_rank, 2)
    before = ranks.pids(2)
    yield
    assert ranks.pids(2) == []
    assert ranks.run(own_rank, 2) == [(0, 2), (1, 2)]
    assert not set(ranks.pids(2)) & set(before)
    assert not any(is_running(pid) for pid in before)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_are_in_rank_order(ranks: Ranks) -> None:
    for world_size in (1, 2, 4):
        want = [(rank, world_size) for rank in range(world_size)]
        assert ranks.run(own_rank, world_size) == want
    assert ranks.run(gathered, 4, 10) == [[10, 11, 12, 13]] * 4


def test_calls_share_processes_and_start_from_the_same_random_state(ranks: Ranks) -> None:
    (first, zero), (second, one) = ranks.run(draw, 2)
    before = ranks.pids(2)
    assert first == second == ranks.run(draw, 2)[0][0]
    assert (zero.tolist(), one.tolist()) == ([0, 0], [1, 1])
    assert ranks.pids(2) == before


def test_workers_begin_with_everything_imported(ranks: Ranks) -> None:
    assert ranks.run(missing_modules, 2) == [[], []]


def test_meshes_are_made_once_and_workers_have_one_thread(ranks: Ranks) -> None:
    assert ranks.run(same_mesh, 2) == [(True, 0, 1), (True, 1, 1)]


@pytest.mark.usefixtures("alive")
def test_an_exception_names_the_rank_and_the_line(ranks: Ranks) -> None:
    with pytest.raises(
        RankError, match=r"fail_on_rank_1: rank 1 of 2 raised KeyError: 'the reason'"
    ) as caught:
        ranks.run(fail_on_rank_1, 2)
    assert 'raise KeyError("the reason")' in str(caught.value)


@pytest.mark.usefixtures("alive")
def test_a_rank_that_is_killed_is_the_cause(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"^die_on_rank_1: rank 1 of 2 died with exit code -9"):
        ranks.run(die_on_rank_1, 2)


@pytest.mark.usefixtures("alive")
def test_a_rank_that_died_between_calls_is_found(ranks: Ranks) -> None:
    os.kill(ranks.pids(2)[1], signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 2 died with exit code -9"):
        ranks.run(gathered, 2, 0)


@pytest.mark.usefixtures("alive")
def test_a_rank_that_hangs_is_ended_and_shown(ranks: Ranks) -> None:
    begin = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not finish in 0.5 s") as caught:
        ranks.run(hang_on_rank_0, 2, timeout=0.5)
    assert time.monotonic() - begin < 20
    assert "in hang_on_rank_0" in str(caught.value)


@pytest.mark.usefixtures("alive")
def test_a_warning_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="raised UserWarning: of this"):
        ranks.run(warn, 2)


@pytest.mark.usefixtures("alive")
def test_a_result_that_cannot_be_sent_is_an_error(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"unpicklable: rank [01] of 2 raised AttributeError"):
        ranks.run(unpicklable, 2)


PARENT = """
import os, signal
from tests.parallel.pool import Ranks
from tests.parallel.test_pool import hang_on_rank_0, own_rank
if __name__ == "__main__":
    ranks = Ranks()
    ranks.run(own_rank, 2)
    print(*ranks.pids(2), flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "signal.alarm(1); ranks.run(hang_on_rank_0, 2)"])
def test_workers_go_with_their_parent(tmp_path: Path, end: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(end=end))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    limit = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < limit, "workers outlive the process that started them"
        time.sleep(0.1)
