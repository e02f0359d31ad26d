"""Tokenised documents in flat arrays, and the split into training and validation documents.

Shape suffixes: N tokens of all documents, D documents.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.train.corpus import Document
from trimtab.train.images import Pictures
from trimtab.train.tokenizer import Tokenizer

# Texts handed to the tokenizer at once: enough for its threads, little enough to keep memory flat.
_BATCH_DOCUMENTS = 512


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenStore:
    """Documents as token ids.

    Args:
        tokens_N: (N,) ids of all documents one after another, each document with its special tokens.
        offsets_D: (D + 1,) int64; document d is `tokens_N[offsets_D[d]:offsets_D[d + 1]]`, never empty.
        domain_ids_D: (D,) int64 index into `domains`.
        order_D: (D,) uint64 hash of each document's domain and name; decides what is held out.
        domains: names of the domains, sorted.
        predicted_N: (N,) bool, True where a token is a label of the loss, as an assistant's are in a
            conversation; None: all are. A document's first token never is one, whatever it says here.
        whole: documents are not to be divided between rows, nor between training and validation.
        images_N: (N,) int32 number in ``pictures`` of the image that a token stands for, -1 where it stands for
            none; None without images.
        pictures: the images; None without.
    """

    tokens_N: NDArray[np.integer]
    offsets_D: NDArray[np.int64]
    domain_ids_D: NDArray[np.int64]
    order_D: NDArray[np.uint64]
    domains: tuple[str, ...]
    predicted_N: NDArray[np.bool_] | None = None
    whole: bool = False
    images_N: NDArray[np.int32] | None = None
    pictures: Pictures | None = None

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.domain_ids_D)

    @property
    def lengths_D(self) -> NDArray[np.int64]:
        """(D,) tokens of each document."""
        return np.diff(self.offsets_D)

    def predicted(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether tokens are labels, by their places in `tokens_N`; of the shape of ``index``."""
        if self.predicted_N is None:
            return np.ones(index.shape, dtype=np.bool_)
        return self.predicted_N[index]

    def images(self, index: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Images that tokens stand for, by the tokens' places in `tokens_N`; None without images."""
        return None if self.images_N is None else self.images_N[index].astype(np.int64)

    def fingerprint(self) -> str:
        """Hash of the tokens, which are labels, their division into documents, the domains and the images."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(self.domains).encode())
        for array in (self.tokens_N, self.offsets_D, self.domain_ids_D):
            digest.update(np.ascontiguousarray(array).data)
        if self.predicted_N is not None:
            digest.update(self.predicted_N.tobytes())
        if self.images_N is not None and self.pictures is not None:
            digest.update(self.images_N.tobytes())
            digest.update(self.pictures.fingerprint().encode())
        return digest.hexdigest()

    def select(self, documents: NDArray[np.int64], ends: NDArray[np.int64] | None = None) -> TokenStore:
        """Store of some documents, in the given order.

        Args:
            documents: indices of documents.
            ends: (2, len(documents)) first and one-past-last token of each within `tokens_N`, where only
                a part is wanted.

        Returns:
            A new store with the same domains, so that domain ids keep their meaning.
        """
        if ends is None:
            ends = np.stack([self.offsets_D[documents], self.offsets_D[documents + 1]])
        return TokenStore(
            tokens_N=_pieces(self.tokens_N, ends),
            offsets_D=np.concatenate([[0], np.cumsum(ends[1] - ends[0])]).astype(np.int64),
            domain_ids_D=self.domain_ids_D[documents],
            order_D=self.order_D[documents],
            domains=self.domains,
            predicted_N=None if self.predicted_N is None else _pieces(self.predicted_N, ends),
            whole=self.whole,
            images_N=None if self.images_N is None else _pieces(self.images_N, ends),
            pictures=self.pictures,
        )


def tokenize(documents: Iterable[Document], tokenizer: Tokenizer, *, add_bos: bool = False) -> TokenStore:
    """Tokenise documents: [bos] + ids + eos each.

    Args:
        documents: consumed once, in order.
        tokenizer: the tokenizer.
        add_bos: open each document with the tokenizer's bos, so that its first token is predicted too.

    Raises:
        ValueError: there are no documents, or `add_bos` with a tokenizer that has no bos.
    """
    if add_bos and tokenizer.bos_id is None:
        raise ValueError(
            "add_bos=True needs a tokenizer with a bos token, and this one has none; set it False"
        )
    dtype = np.dtype(np.uint16) if tokenizer.vocab_size <= 2**16 else np.dtype(np.uint32)
    prefix = [np.array([tokenizer.bos_id], dtype=dtype)] if add_bos else []
    eos = np.array([tokenizer.eos_id], dtype=dtype)
    chunks: list[NDArray[Any]] = []
    lengths: list[int] = []
    names: list[str] = []
    order: list[int] = []
    for batch in _batched(documents, _BATCH_DOCUMENTS):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        pieces: list[NDArray[Any]] = []
        for document, ids in zip(batch, encoded, strict=True):
            pieces += [*prefix, ids.astype(dtype), eos]
            lengths.append(len(prefix) + len(ids) + 1)
            names.append(document.domain)
            order.append(name_hash(f"{document.domain}\n{document.name}"))
        chunks.append(np.concatenate(pieces))
    if not lengths:
        raise ValueError("the source holds no documents; give at least one text")
    domains = tuple(sorted(set(names)))
    index = {domain: i for i, domain in enumerate(domains)}
    return TokenStore(
        tokens_N=np.concatenate(chunks),
        offsets_D=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        domain_ids_D=np.array([index[name] for name in names], dtype=np.int64),
        order_D=np.array(order, dtype=np.uint64),
        domains=domains,
    )


def split_validation(store: TokenStore, fraction: float) -> tuple[TokenStore, TokenStore]:
    """Hold out 0.5 to 1.25 times `fraction` of the tokens of every domain, by whole documents.

    Which documents are held out depends on their names alone, not on a seed or on their order. A domain
    of one document, or of documents too large to give away, gives the end of its largest one instead; where
    documents are whole, it gives its shortest ones.

    Args:
        store: all documents.
        fraction: share to hold out, in [0, 0.5]; 0 holds out nothing.

    Returns:
        Training and validation store, each in the order of `store`.

    Raises:
        ValueError: a domain is too small to be divided.
    """
    lengths_D = store.lengths_D
    # The held-out part of a document is [start, its end): nearly always all of it or nothing.
    starts_D = store.offsets_D[1:].copy()
    for domain_id, domain in enumerate(store.domains if fraction > 0 else ()):
        members = np.flatnonzero(store.domain_ids_D == domain_id)
        members = members[np.argsort(store.order_D[members], kind="stable")]
        total = int(lengths_D[members].sum())
        target = max(1, round(fraction * total))
        if target >= total:
            raise ValueError(
                f"domain {domain!r} has {total} tokens, too few to hold out validation_fraction={fraction} "
                f"of them; add text, or set validation_fraction=0"
            )
        taken = 0
        for d in members:
            if taken >= target:
                break
            # A document much larger than the share stays in training.
            if taken + lengths_D[d] <= 1.25 * target:
                starts_D[d] = store.offsets_D[d]
                taken += int(lengths_D[d])
        if 2 * taken < target and store.whole:
            _take_shortest(store, members, starts_D, target)
        elif 2 * taken < target:
            # What was passed over is larger than what is missing, so its end covers it.
            left = members[starts_D[members] > store.offsets_D[members]]
            largest = left[np.argmax(lengths_D[left])]
            starts_D[largest] -= target - taken
    train = np.flatnonzero(starts_D > store.offsets_D[:-1])
    held_out = np.flatnonzero(starts_D < store.offsets_D[1:])
    return (
        store.select(train, np.stack([store.offsets_D[train], starts_D[train]])),
        store.select(held_out, np.stack([starts_D[held_out], store.offsets_D[held_out + 1]])),
    )


def _take_shortest(
    store: TokenStore, members: NDArray[np.int64], starts_D: NDArray[np.int64], target: int
) -> None:
    """Hold out whole documents of a domain, the shortest first, until half of ``target`` tokens are."""
    lengths_D = store.lengths_D
    kept = members[starts_D[members] > store.offsets_D[members]]
    taken = int(lengths_D[members].sum() - lengths_D[kept].sum())
    for d in kept[np.argsort(lengths_D[kept], kind="stable")]:
        if 2 * taken >= target:
            return
        starts_D[d] = store.offsets_D[d]
        taken += int(lengths_D[d])
        if (starts_D[members] == store.offsets_D[members]).all():
            raise ValueError(
                f"domain {store.domains[store.domain_ids_D[d]]!r} has {len(members)} documents, too few to hold "
                "one out and train on another; add some, or set validation_fraction=0"
            )


def _pieces(values_N: NDArray[Any], ends: NDArray[np.int64]) -> NDArray[Any]:
    """Stretches of an array one after another, from (2, n) first and one-past-last places."""
    pieces = [values_N[start:end] for start, end in ends.T]
    return np.concatenate(pieces) if pieces else values_N[:0]


def name_hash(name: str) -> int:
    """64 bits that depend on a document's domain and name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
