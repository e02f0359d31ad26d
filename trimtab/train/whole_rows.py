"""Rows of whole documents: several short ones in a row, never a part of one.

A conversation that is cut loses the question of its answer. So these rows hold documents as they are, placed with
little padding: about 1 % for documents much shorter than a row.

Shape suffixes: B rows, S tokens of a row, D documents, R rows of an epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from trimtab.train.packing import Permute, Rows, pad_rows
from trimtab.train.token_store import TokenStore


class WholeRows:
    """Documents placed in rows once, each row in every epoch; the order of rows changes.

    Args:
        store: the documents, at least one, none longer than S.
        seq_len: S.
        permute: order of R rows in an epoch.

    Raises:
        ValueError: a document is longer than S.
    """

    def __init__(self, store: TokenStore, seq_len: int, permute: Permute) -> None:
        self._store = store
        self._seq_len = seq_len
        self._permute = permute
        self._documents_of_row = place_documents(store.lengths_D, seq_len)
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def rows_per_epoch(self) -> float:
        """R."""
        return len(self._documents_of_row)

    def read(self, first_row: int, num_rows: int) -> Rows:
        """Rows `first_row` to `first_row + num_rows - 1`; they may span epochs."""
        places = [
            divmod(number, len(self._documents_of_row)) for number in range(first_row, first_row + num_rows)
        ]
        return self._read_rows([int(self._order(epoch)[place]) for epoch, place in places])

    def read_once(self, first_row: int, num_rows: int) -> Rows:
        """The same rows of epoch 0 alone: what lies beyond its end is padding."""
        return pad_rows(self._read_rows(self._order(0)[first_row : first_row + num_rows].tolist()), num_rows)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 2}
            self._orders[epoch] = self._permute(epoch, len(self._documents_of_row))
        return self._orders[epoch]

    def _read_rows(self, rows: list[int]) -> Rows:
        B, S = len(rows), self._seq_len
        index_BS = np.zeros((B, S), dtype=np.int64)
        starts_BS = np.zeros((B, S), dtype=np.bool_)
        domain_ids_BS = np.full((B, S), -1, dtype=np.int64)
        for b, row in enumerate(rows):
            place = 0
            for d in self._documents_of_row[row]:
                first, end = self._store.offsets_D[d : d + 2]
                stop = place + int(end - first)
                index_BS[b, place:stop] = np.arange(first, end)
                starts_BS[b, place] = True
                domain_ids_BS[b, place:stop] = self._store.domain_ids_D[d]
                place = stop
        valid_BS = domain_ids_BS >= 0
        return Rows(
            ids_BS=np.where(valid_BS, self._store.tokens_N[index_BS], 0).astype(np.int64),
            starts_BS=starts_BS,
            domain_ids_BS=domain_ids_BS,
            predicted_BS=self._store.predicted(index_BS) & valid_BS,
            images_BS=self._store.images(index_BS),
            pictures=self._store.pictures,
        )


def place_documents(lengths_D: NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Which documents each row holds: the longest first, each where it leaves the least room (best fit).

    Args:
        lengths_D: (D,) tokens of each document.
        seq_len: S.

    Returns:
        Documents of each row, which depend on the lengths alone.

    Raises:
        ValueError: a document is longer than S.
    """
    if len(lengths_D) and int(lengths_D.max()) > seq_len:
        raise ValueError(
            f"a document of {int(lengths_D.max())} tokens does not fit into a row of seq_len={seq_len}; raise "
            "data.seq_len, or cut it before"
        )
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # keys of the above, sorted
    for d in np.argsort(-lengths_D, kind="stable").tolist():
        length = int(lengths_D[d])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[at]
        rows[row].append(d)
        left = room - length
        if left:
            if left not in rows_by_room:
                rows_by_room[left] = []
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows
