"""Rows of tokens from documents, and the microbatch that a model receives.

Shape suffixes: B rows of a microbatch, S tokens of a row, G segments of a microbatch, D documents, C chunks
of documents.

A *segment* is a stretch of one document within one row: nothing is predicted across its start, and its
positions count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.train.images import ImageInputs, Pictures
from trimtab.train.token_store import TokenStore

IGNORED_LABEL = -100

# Permutation of n items in an epoch.
Permute = Callable[[int, int], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBatch:
    """One microbatch.

    Args:
        input_ids_BS: (B, S) int64 token ids; padding holds the tokenizer's pad id.
        labels_BS: (B, S) int64, in the convention of Hugging Face models, which shift internally: the same
            positions as `input_ids_BS`, so that logits at t are compared with labels at t + 1. -100 where
            nothing is predicted: padding, the first token of each segment, and in conversations what no
            assistant said.
        valid_mask_BS: (B, S) bool, True = counts, False = padding.
        position_ids_BS: (B, S) int64, from 0 in each segment. Padding continues the segment before it.
        cu_seqlens_G: (G + 1,) int32 starts of the segments in the flattened B * S tokens, then B * S. Each
            row starts a segment. Padding belongs to the segment before it; a row of padding only, which
            occurs in validation, is one segment without valid tokens.
        domain_ids_BS: (B, S) int64 index into the loader's `domains`; -1 for padding.
        num_tokens: valid tokens.
        num_label_tokens: labels that are not -100: the terms of the loss.
        num_sequences: segments with at least one valid token.
        images: of a source with images, those of this microbatch, which may be none; None of text.
    """

    input_ids_BS: Tensor
    labels_BS: Tensor
    valid_mask_BS: Tensor
    position_ids_BS: Tensor
    cu_seqlens_G: Tensor
    domain_ids_BS: Tensor
    num_tokens: int
    num_label_tokens: int
    num_sequences: int
    images: ImageInputs | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> TokenBatch:
        """The same microbatch with its tensors on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _map(self, function: Callable[[Tensor], Tensor]) -> TokenBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = function(value)
            elif isinstance(value, ImageInputs):
                values[name] = value.map(function)
        return TokenBatch(**values)

    def send(self, device: torch.device) -> TokenBatch:
        """The same microbatch on a device, to which it is copied while the device and the host go on."""
        if device.type == "cpu":
            return self.to(device)
        # From pinned memory alone: from other memory each copy waits for all that the device has to do.
        pinned = self._map(torch.Tensor.pin_memory) if device.type == "cuda" else self
        return pinned.to(device, non_blocking=True)

    def document_ids_BS(self) -> Tensor:
        """(B, S) int64 index of each token's segment in the microbatch, 0 to G - 1."""
        starts = torch.zeros(self.input_ids_BS.numel(), dtype=torch.int64, device=self.input_ids_BS.device)
        # Assigning 1 to indexed places would copy it to the device and wait.
        starts.index_fill_(0, self.cu_seqlens_G[:-1].long(), 1)
        return (starts.cumsum(0) - 1).view_as(self.input_ids_BS)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Rows before they become tensors.

    Args:
        ids_BS: (B, S) int64 token ids, 0 for padding.
        starts_BS: (B, S) bool, True at the first token of a document; row starts need not be marked.
        domain_ids_BS: (B, S) int64, -1 for padding.
        predicted_BS: (B, S) bool, True where a token is a label; the first of a segment never is one.
        images_BS: (B, S) int64 image that a token stands for, by its number in ``pictures``, else -1; None without
            images.
        pictures: the images of the source; None without.
    """

    ids_BS: NDArray[np.int64]
    starts_BS: NDArray[np.bool_]
    domain_ids_BS: NDArray[np.int64]
    predicted_BS: NDArray[np.bool_]
    images_BS: NDArray[np.int64] | None = None
    pictures: Pictures | None = None

    def to_batch(self, pad_id: int, *, patches: bool = True) -> TokenBatch:
        """Derive labels, positions and segment bounds; ``patches`` as in `Pictures.to_inputs`."""
        B, S = self.ids_BS.shape
        valid_BS = self.domain_ids_BS >= 0
        starts_BS = self.starts_BS & valid_BS
        starts_BS[:, 0] = True
        columns_S = np.arange(S, dtype=np.int64)
        first_BS = np.maximum.accumulate(np.where(starts_BS, columns_S, 0), axis=1)
        ids_BS = np.where(valid_BS, self.ids_BS, pad_id)
        labels_BS = np.where(valid_BS & ~starts_BS & self.predicted_BS, ids_BS, IGNORED_LABEL)
        cu_seqlens_G = np.append(np.flatnonzero(starts_BS), B * S).astype(np.int32)
        return TokenBatch(
            input_ids_BS=torch.from_numpy(ids_BS),
            labels_BS=torch.from_numpy(labels_BS),
            valid_mask_BS=torch.from_numpy(valid_BS),
            position_ids_BS=torch.from_numpy(columns_S - first_BS),
            cu_seqlens_G=torch.from_numpy(cu_seqlens_G),
            domain_ids_BS=torch.from_numpy(self.domain_ids_BS),
            num_tokens=int(valid_BS.sum()),
            num_label_tokens=int((labels_BS != IGNORED_LABEL).sum()),
            # A segment's first token is valid unless its row is all padding.
            num_sequences=int((starts_BS & valid_BS).sum()),
            images=self._images(columns_S - first_BS, valid_BS, patches),
        )

    def _images(
        self, positions_BS: NDArray[np.int64], valid_BS: NDArray[np.bool_], patches: bool
    ) -> ImageInputs | None:
        if self.images_BS is None or self.pictures is None:
            return None
        images_BS = np.where(valid_BS, self.images_BS, -1)
        return self.pictures.to_inputs(images_BS, positions_BS, patches=patches)


class RowStream(Protocol):
    """Endless rows of one set of documents, addressed by number: reading needs no state."""

    @property
    def rows_per_epoch(self) -> float:
        """Rows in which each document appears once; with packing, not an integer."""

    def read(self, first_row: int, num_rows: int) -> Rows:
        """Rows `first_row` to `first_row + num_rows - 1`; they may span epochs."""

    def read_once(self, first_row: int, num_rows: int) -> Rows:
        """The same rows of epoch 0 alone: what lies beyond its end is padding."""


class PackedRows:
    """Documents one after another, cut every S tokens; the epochs follow each other without a gap.

    No token is lost and there is no padding: row r is tokens [r S, (r + 1) S) of the endless sequence
    (documents of epoch 0 in that epoch's order, documents of epoch 1, ...).

    Args:
        store: the documents, at least one.
        seq_len: S.
        permute: order of D documents in an epoch.
    """

    def __init__(self, store: TokenStore, seq_len: int, permute: Permute) -> None:
        self._store = store
        self._seq_len = seq_len
        self._permute = permute
        self._num_tokens = len(store.tokens_N)
        self._layouts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def rows_per_epoch(self) -> float:
        """Tokens of the documents divided by S."""
        return self._num_tokens / self._seq_len

    def read(self, first_row: int, num_rows: int) -> Rows:
        """Rows `first_row` to `first_row + num_rows - 1`; they may span epochs."""
        S = self._seq_len
        position, end = first_row * S, (first_row + num_rows) * S
        pieces = []
        while position < end:
            epoch, start = divmod(position, self._num_tokens)
            stop = min(self._num_tokens, start + end - position)
            pieces.append(self._read_epoch(epoch, start, stop))
            position += stop - start
        return _rows(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)), seq_len=S)

    def read_once(self, first_row: int, num_rows: int) -> Rows:
        """The same rows of epoch 0 alone: what lies beyond its end is padding."""
        start, stop = (
            min(row * self._seq_len, self._num_tokens) for row in (first_row, first_row + num_rows)
        )
        ids, starts, domain_ids, predicted = self._read_epoch(0, start, stop)
        padding = num_rows * self._seq_len - len(ids)
        return _rows(
            np.pad(ids, (0, padding)),
            np.pad(starts, (0, padding)),
            np.pad(domain_ids, (0, padding), constant_values=-1),
            np.pad(predicted, (0, padding)),
            seq_len=self._seq_len,
        )

    def _read_epoch(
        self, epoch: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.bool_]]:
        """Ids, document starts, domains and what is a label, of tokens [start, stop) of an epoch."""
        order_D, bounds_D = self._layout(epoch)
        positions = np.arange(start, stop, dtype=np.int64)
        slots = np.searchsorted(bounds_D, positions, side="right") - 1
        documents = order_D[slots]
        offsets = positions - bounds_D[slots]
        places = self._store.offsets_D[documents] + offsets
        ids = self._store.tokens_N[places].astype(np.int64)
        return ids, offsets == 0, self._store.domain_ids_D[documents], self._store.predicted(places)

    def _layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the documents in an epoch and the position of each one's first token."""
        if epoch not in self._layouts:
            order_D = self._permute(epoch, self._store.num_documents)
            ends_D = np.cumsum(self._store.lengths_D[order_D])
            # Rows are read in any order within about an epoch of text: it touches three epochs at most.
            self._layouts = {e: layout for e, layout in self._layouts.items() if abs(e - epoch) <= 2}
            self._layouts[epoch] = (order_D, np.concatenate([[0], ends_D[:-1]]))
        return self._layouts[epoch]


class PaddedRows:
    """Each document cut to chunks of at most S tokens, one chunk in a row, the rest padding.

    Args:
        store: the documents, at least one.
        seq_len: S.
        permute: order of C chunks in an epoch.
    """

    def __init__(self, store: TokenStore, seq_len: int, permute: Permute) -> None:
        self._store = store
        self._seq_len = seq_len
        self._permute = permute
        chunks_D = -(-store.lengths_D // seq_len)
        self._document_C = np.repeat(np.arange(store.num_documents), chunks_D)
        number_C = np.arange(len(self._document_C)) - np.repeat(np.cumsum(chunks_D) - chunks_D, chunks_D)
        self._first_C = store.offsets_D[self._document_C] + number_C * seq_len
        self._length_C = np.minimum(seq_len, store.offsets_D[self._document_C + 1] - self._first_C)
        self._orders: dict[int, NDArray[np.int64]] = {}

    @property
    def rows_per_epoch(self) -> float:
        """C."""
        return float(len(self._document_C))

    def read(self, first_row: int, num_rows: int) -> Rows:
        """Rows `first_row` to `first_row + num_rows - 1`; they may span epochs."""
        num_chunks = len(self._document_C)
        numbers = np.arange(first_row, first_row + num_rows)
        epochs = numbers // num_chunks
        chunks = [
            self._order(int(epoch))[numbers[epochs == epoch] % num_chunks] for epoch in np.unique(epochs)
        ]
        return self._read_chunks(np.concatenate(chunks))

    def read_once(self, first_row: int, num_rows: int) -> Rows:
        """The same rows of epoch 0 alone: what lies beyond its end is padding."""
        return pad_rows(self._read_chunks(self._order(0)[first_row : first_row + num_rows]), num_rows)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if abs(e - epoch) <= 2}
            self._orders[epoch] = self._permute(epoch, len(self._document_C))
        return self._orders[epoch]

    def _read_chunks(self, chunks_B: NDArray[np.int64]) -> Rows:
        columns_S = np.arange(self._seq_len)
        valid_BS = columns_S < self._length_C[chunks_B][:, None]
        index_BS = np.where(valid_BS, self._first_C[chunks_B][:, None] + columns_S, 0)
        domain_ids_B = self._store.domain_ids_D[self._document_C[chunks_B]]
        return Rows(
            ids_BS=np.where(valid_BS, self._store.tokens_N[index_BS], 0).astype(np.int64),
            starts_BS=np.zeros_like(valid_BS),
            domain_ids_BS=np.where(valid_BS, domain_ids_B[:, None], -1),
            predicted_BS=self._store.predicted(index_BS),
            images_BS=self._store.images(index_BS),
            pictures=self._store.pictures,
        )


def pad_rows(rows: Rows, num_rows: int) -> Rows:
    """Rows, and rows of padding below them so that there are ``num_rows``."""
    padding = ((0, num_rows - len(rows.ids_BS)), (0, 0))
    return Rows(
        ids_BS=np.pad(rows.ids_BS, padding),
        starts_BS=np.pad(rows.starts_BS, padding),
        domain_ids_BS=np.pad(rows.domain_ids_BS, padding, constant_values=-1),
        predicted_BS=np.pad(rows.predicted_BS, padding),
        images_BS=None if rows.images_BS is None else np.pad(rows.images_BS, padding, constant_values=-1),
        pictures=rows.pictures,
    )


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Rows under one another."""
    return Rows(
        ids_BS=np.concatenate([part.ids_BS for part in parts]),
        starts_BS=np.concatenate([part.starts_BS for part in parts]),
        domain_ids_BS=np.concatenate([part.domain_ids_BS for part in parts]),
        predicted_BS=np.concatenate([part.predicted_BS for part in parts]),
        images_BS=_stacked([part.images_BS for part in parts]),
        pictures=parts[0].pictures,
    )


def _stacked(parts: Sequence[NDArray[np.int64] | None]) -> NDArray[np.int64] | None:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None


def shuffled(*key: int) -> Permute:
    """Permutations that depend on a key and the epoch, alike on every machine and numpy version."""

    def permute(epoch: int, n: int) -> NDArray[np.int64]:
        # Sorting raw words, not Generator.permutation: numpy freezes the bit stream, not the methods on it.
        return np.argsort(random_words(n, *key, epoch), kind="stable")

    return permute


def in_order(epoch: int, n: int) -> NDArray[np.int64]:
    """The order of the source in every epoch."""
    return np.arange(n, dtype=np.int64)


def random_words(n: int, *key: int) -> NDArray[np.uint64]:
    """Random 64-bit words that depend on a key of non-negative integers."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def _rows(
    ids: NDArray[np.int64],
    starts: NDArray[np.bool_],
    domain_ids: NDArray[np.int64],
    predicted: NDArray[np.bool_],
    *,
    seq_len: int,
) -> Rows:
    return Rows(
        ids_BS=ids.reshape(-1, seq_len),
        starts_BS=starts.reshape(-1, seq_len),
        domain_ids_BS=domain_ids.reshape(-1, seq_len),
        predicted_BS=predicted.reshape(-1, seq_len),
    )
