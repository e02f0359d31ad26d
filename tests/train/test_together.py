"""Work of all ranks in one process; between ranks it is tested by checkpoints (tests/parallel)."""

import pytest

from trimtab.train.together import RanksFailedError, gathered, on_all_ranks


def fails(*_):
    raise OSError("no space")


def test_one_process_is_one_rank():
    kept = object()
    assert on_all_ranks(lambda: kept) is kept
    assert gathered(lambda: 2, lambda results: [*results, 3]) == [2, 3]
    with pytest.raises(RanksFailedError, match=r"^OSError: no space$"):
        on_all_ranks(fails)
    with pytest.raises(RanksFailedError, match=r"^OSError: no space$") as caught:
        gathered(lambda: 2, fails)
    assert isinstance(caught.value.__cause__, OSError)


def test_failures_of_many_ranks_are_one_line():
    alike = RanksFailedError({3: "a", 1: "a", 2: "b"}, 4)
    assert str(alike) == "ranks 1, 3 of 4: a; rank 2 of 4: b"
    different = RanksFailedError({rank: f"file {rank}" for rank in range(8)}, 8)
    assert str(different).endswith("rank 2 of 8: file 2; and 5 other errors")
