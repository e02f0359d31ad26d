"""The data loader: an endless, resumable sequence of microbatches of fixed shape.

Rows are drawn in chunks, and chunk g of a run is a function of the configuration, the text and g alone. A
microbatch is B neighbouring rows of that sequence, usually one chunk, and data rank r of R reads the
microbatches r, R + r, 2 R + r, ...; so what an optimiser step is trained on depends neither on the number of
ranks nor on B, and the position in the data is one integer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.train.chat import ChatConfig, chat_encoder, check_chat, encode_conversations
from trimtab.train.conversations import read_conversations, read_fixed_conversations
from trimtab.train.corpus import EmbeddedCorpusConfig, load_fixed_corpus
from trimtab.train.images import ImageLayout
from trimtab.train.images_source import check_images, read_images
from trimtab.train.images_store import ImagesConfig
from trimtab.train.packing import (
    PackedRows,
    PaddedRows,
    Permute,
    Rows,
    RowStream,
    TokenBatch,
    in_order,
    join_rows,
    random_words,
    shuffled,
)
from trimtab.train.sources import read_documents
from trimtab.train.token_store import TokenStore, split_validation, tokenize
from trimtab.train.tokenizer import Tokenizer, TokenizerConfig
from trimtab.train.whole_rows import WholeRows

_STATE_VERSION = 1
BUILT_IN = ("embedded", "fixed", "shapes")
# First entry after the seed in every random key, so that two uses never share random words.
_DOCUMENT_ORDER, _SCHEDULE, _ROW_ORDER = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text, tokenizer, and the shape and order of microbatches.

    Args:
        seq_len: S, tokens of a row; at least 2.
        microbatch_size: rows that are drawn together, and rows of one forward on one data rank outside a
            pipeline. None: all rows of an optimiser step are drawn together, and each data rank's share of
            them is one forward.
        source: "embedded" (text found on this machine, four domains), "fixed" (10 kB shipped with trimtab,
            the same everywhere), or files and directories of `.txt`, `.jsonl`, `.parquet`, each optionally as
            `domain=path`. A file called "embedded" is "./embedded". "shapes" draws images with captions,
            for a model that takes images. With ``chat.enable``, "fixed" (two dozen
            conversations shipped with trimtab) or files of conversations.
        tokenizer: the tokenizer.
        embedded: what to read for `source="embedded"`.
        text_field: field or column of the user's files that holds the text.
        domain_field: optional field or column of the user's files that holds the domain.
        chat: whether the source holds conversations, of which only what an assistant says is predicted.
        images: images of the source, for a model that takes them; without, fields with images are not read.
        packing: True: documents one after another, no padding; of conversations and of documents with images
            several whole ones in a row, with little padding. False: each document has rows of its own, padded.
        domain_pure: rows that are drawn together are of one domain, in proportion to the domains' sizes.
        add_bos: open each document with the tokenizer's bos.
        shuffle: new order of the documents (without packing: of the rows) in each epoch; False: the source's.
        seed: of the order.
        validation_fraction: share of every domain's tokens held out, by document, in [0, 0.5].
        max_validation_microbatches: of each domain, over all data ranks, of as many rows as are drawn
            together; None: all held-out text.

    Raises:
        ValueError: a value out of range.
    """

    seq_len: int
    microbatch_size: int | None
    source: str | tuple[str, ...] = "embedded"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embedded: EmbeddedCorpusConfig = field(default_factory=EmbeddedCorpusConfig)
    text_field: str = "text"
    domain_field: str = "domain"
    chat: ChatConfig = field(default_factory=ChatConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    packing: bool = True
    domain_pure: bool = False
    add_bos: bool = False
    shuffle: bool = True
    seed: int = 0
    validation_fraction: float = 0.05
    max_validation_microbatches: int | None = None

    def __post_init__(self) -> None:
        """Check ranges, and warn of settings without effect."""
        for name, least in (("seq_len", 2), ("microbatch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}; raise data.{name}")
        if not 0 <= self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} must be in [0, 0.5]; "
                f"lower data.validation_fraction"
            )
        if self.max_validation_microbatches is not None and self.max_validation_microbatches < 1:
            raise ValueError(
                f"max_validation_microbatches={self.max_validation_microbatches} must be at least 1; "
                f"set data.validation_fraction=0 for a run without validation"
            )
        if not self.source or not all(self.source):
            raise ValueError(f"source={self.source!r} names nothing; give 'embedded', 'fixed' or paths")
        if self.source != "embedded" and self.embedded != EmbeddedCorpusConfig():
            warnings.warn(f"data.embedded has no effect with source={self.source!r}", stacklevel=3)
        if self.source in BUILT_IN:
            for name, default in (("text_field", "text"), ("domain_field", "domain")):
                if getattr(self, name) != default:
                    warnings.warn(f"data.{name} has no effect with source={self.source!r}", stacklevel=3)
        if self.chat.enable:
            check_chat(self)
        check_images(self)
        if self.max_validation_microbatches is not None and self.validation_fraction == 0:
            warnings.warn(
                "data.max_validation_microbatches has no effect with validation_fraction=0", stacklevel=3
            )

    @property
    def has_images(self) -> bool:
        """Whether documents may have images."""
        return self.source == "shapes" or self.images.enable

    def build(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        microbatch_size: int | None = None,
        global_batch_size: int | None = None,
        image_layout: Callable[[int], ImageLayout] | None = None,
        patches: bool = True,
    ) -> TokenLoader:
        """Read, check and tokenise all text.

        Args:
            rank: data-parallel rank, in [0, world_size).
            world_size: R, number of data-parallel ranks.
            microbatch_size: B, rows of one forward; None: as the field says.
            global_batch_size: rows of an optimiser step, which are drawn together where the field is None;
                None: one forward on each data rank.
            image_layout: how the model cuts images, given the tokenizer's number of ids; None: it takes none.
            patches: read images; False on ranks that do not need them.

        Raises:
            ValueError: the source or the tokenizer can not be read, a domain is too small to be divided, or
                nothing says how many rows are drawn together.
        """
        tokenizer = self.tokenizer.build()
        if self.has_images:
            store = read_images(self, tokenizer, image_layout)
        else:
            store = self._conversations(tokenizer) if self.chat.enable else self._texts(tokenizer)
        train, validation = split_validation(store, self.validation_fraction)
        return TokenLoader(
            self,
            tokenizer=tokenizer,
            train=train,
            validation=validation,
            rank=rank,
            world_size=world_size,
            microbatch_size=microbatch_size,
            global_batch_size=global_batch_size,
            patches=patches,
        )

    def _texts(self, tokenizer: Tokenizer) -> TokenStore:
        if self.source == "embedded":
            documents: Any = self.embedded.build()
        elif self.source == "fixed":
            documents = load_fixed_corpus()
        else:
            documents = read_documents(self.paths, text_field=self.text_field, domain_field=self.domain_field)
        return tokenize(documents, tokenizer, add_bos=self.add_bos)

    def _conversations(self, tokenizer: Tokenizer) -> TokenStore:
        if self.source == "fixed":
            conversations = read_fixed_conversations()
        else:
            conversations = read_conversations(
                self.paths,
                messages_field=self.chat.messages_field,
                tools_field=self.chat.tools_field,
                domain_field=self.domain_field,
            )
        encoder = chat_encoder(self.chat, self.tokenizer)
        return encode_conversations(
            conversations, encoder, tokenizer, seq_len=self.seq_len, too_long=self.chat.too_long
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The user's files and directories."""
        return (self.source,) if isinstance(self.source, str) else self.source


class TokenLoader:
    """Endless iterator of microbatches; made by `DataConfig.build()`.

    Args:
        config: shape and order.
        tokenizer: the tokenizer that made the stores.
        train: documents to train on.
        validation: documents held out; may be empty.
        rank: data-parallel rank.
        world_size: R, number of data-parallel ranks.
        microbatch_size: B, rows of one forward; None: ``config.microbatch_size``.
        global_batch_size: rows of an optimiser step, which are drawn together where
            ``config.microbatch_size`` is None; None: one forward on each data rank.
        patches: read images; False on ranks that do not need them.

    Raises:
        ValueError: `rank` is not in [0, world_size), or nothing says how many rows are drawn together.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        tokenizer: Tokenizer,
        train: TokenStore,
        validation: TokenStore,
        rank: int = 0,
        world_size: int = 1,
        microbatch_size: int | None = None,
        global_batch_size: int | None = None,
        patches: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank} must be in [0, world_size={world_size}); give the data-parallel rank"
            )
        chunk_size = config.microbatch_size or global_batch_size or (microbatch_size or 0) * world_size
        if not chunk_size:
            raise ValueError(
                "microbatch_size=None draws the rows of an optimiser step together; say global_batch_size=..., "
                "or set data.microbatch_size"
            )
        self.config = config
        self._patches = patches
        self.microbatch_size = microbatch_size if microbatch_size is not None else chunk_size
        self.tokenizer = tokenizer
        self._chunk_size = chunk_size
        self._rank = rank
        self._world_size = world_size
        self._domains = train.domains
        self._num_tokens_per_domain = _tokens_per_domain(train)
        self._validation = validation
        self._num_read = 0
        self._row_orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._cycles: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        if config.domain_pure and len(train.domains) == 1:
            warnings.warn(f"domain_pure has no effect: {train.domains[0]!r} is the only domain", stacklevel=3)
        groups = (
            [[i] for i in range(len(train.domains))] if config.domain_pure else [[*range(len(train.domains))]]
        )
        self._streams = [self._stream(train, group, shuffle=config.shuffle) for group in groups]
        for group, stream in zip(groups, self._streams, strict=True):
            if stream.rows_per_epoch < chunk_size:
                names = ", ".join(train.domains[i] for i in group)
                warnings.warn(
                    f"{names}: {stream.rows_per_epoch:.2f} rows of seq_len={config.seq_len} do not fill a "
                    f"microbatch of {chunk_size}: text repeats within it; add text, or lower seq_len or "
                    f"microbatch_size",
                    stacklevel=3,
                )
        # Chunks of each stream in a cycle, one pass over the text up to rounding.
        self._per_cycle = np.array(
            [max(1, round(s.rows_per_epoch / chunk_size)) for s in self._streams], dtype=np.int64
        )
        # Without the arguments that do not change training microbatches.
        self._fingerprint: dict[str, str | int | bool] = {
            "text": train.fingerprint(),
            "tokenizer": tokenizer.fingerprint,
            "seq_len": config.seq_len,
            "microbatch_size": chunk_size,
            "packing": config.packing,
            "domain_pure": config.domain_pure,
            "shuffle": config.shuffle,
            "seed": config.seed,
        }
        if train.whole:
            self._fingerprint["whole_documents"] = True

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted; `TokenBatch.domain_ids_BS` indexes them."""
        return self._domains

    @property
    def num_tokens_per_domain(self) -> dict[str, int]:
        """Training tokens of each domain in one epoch, special tokens included."""
        return dict(self._num_tokens_per_domain)

    @property
    def num_validation_tokens_per_domain(self) -> dict[str, int]:
        """Held-out tokens of each domain, before `max_validation_microbatches`."""
        return _tokens_per_domain(self._validation)

    @property
    def microbatches_per_epoch(self) -> int:
        """Chunks of rows, over all data ranks, in one pass over the training text, up to rounding."""
        return int(self._per_cycle.sum())

    @property
    def epoch(self) -> float:
        """Passes over the training text so far, by all data ranks."""
        return self._num_rows / (self.microbatches_per_epoch * self._chunk_size)

    @property
    def _num_rows(self) -> int:
        """Rows read so far by all data ranks."""
        return self._num_read * self._world_size * self.microbatch_size

    def __iter__(self) -> Iterator[TokenBatch]:
        return self

    def __next__(self) -> TokenBatch:
        first = self._num_rows + self._rank * self.microbatch_size
        self._num_read += 1
        parts, last = [], first + self.microbatch_size
        while first < last:
            chunk, place = divmod(first, self._chunk_size)
            num_rows = min(last - first, self._chunk_size - place)
            parts.append(self._read(chunk, place, num_rows))
            first += num_rows
        return join_rows(parts).to_batch(self.tokenizer.pad_id, patches=self._patches)

    def _read(self, chunk: int, place: int, num_rows: int) -> Rows:
        """Rows [place, place + num_rows) of a chunk."""
        stream, number = self._locate(chunk)
        if not self.config.shuffle:
            return self._streams[stream].read(number * self._chunk_size + place, num_rows)
        cycle, position = divmod(number, int(self._per_cycle[stream]))
        order = self._row_order(stream, cycle)
        first = position * self._chunk_size + place
        chosen = cycle * len(order) + order[first : first + num_rows]
        return join_rows([self._streams[stream].read(int(row), 1) for row in chosen])

    def _row_order(self, stream: int, cycle: int) -> NDArray[np.int64]:
        """Order in which a stream's rows of a cycle are read: neighbours are often of one document."""
        key = (stream, cycle)
        if key not in self._row_orders:
            self._row_orders = {k: order for k, order in self._row_orders.items() if k[0] != stream}
            num_rows = int(self._per_cycle[stream]) * self._chunk_size
            permute = shuffled(self.config.seed, _ROW_ORDER, stream)
            self._row_orders[key] = permute(cycle, num_rows)
        return self._row_orders[key]

    def validation_batches(self) -> Iterator[tuple[str, TokenBatch]]:
        """The held-out text, domain by domain: the same microbatches at every call.

        Every data rank yields the same number of microbatches of each domain, so that collectives match;
        where a rank has no text left its microbatch is all padding (`num_tokens == 0`). Over all ranks each
        held-out token is seen exactly once.

        Yields:
            Name of the domain and a microbatch of it.

        Raises:
            ValueError: nothing was held out.
        """
        if self._validation.num_documents == 0:
            raise ValueError(
                "validation_fraction=0 held nothing out; raise data.validation_fraction to validate"
            )
        B, R = self.microbatch_size, self._world_size
        for domain_id, domain in enumerate(self.domains):
            stream = self._stream(self._validation, [domain_id], shuffle=False)
            num_batches = math.ceil(math.ceil(stream.rows_per_epoch) / B)
            limit = self.config.max_validation_microbatches
            if limit is not None:
                num_batches = min(num_batches, math.ceil(limit * self._chunk_size / B))
            for index in range(math.ceil(num_batches / R)):
                number = index * R + self._rank
                # Beyond the limit too, a rank without a share gets padding rather than text.
                first = number * B if number < num_batches else math.ceil(stream.rows_per_epoch)
                yield (
                    domain,
                    stream.read_once(first, B).to_batch(self.tokenizer.pad_id, patches=self._patches),
                )

    def state_dict(self) -> dict[str, Any]:
        """Position in the data; equal on all data ranks, and plain enough for JSON.

        Raises:
            ValueError: a chunk is read in part, which no end of an optimiser step is.
        """
        num_chunks, rest = divmod(self._num_rows, self._chunk_size)
        if rest:
            raise ValueError(
                f"{rest} of {self._chunk_size} rows that are drawn together are read; take the state at the end "
                "of an optimiser step, whose rows are a multiple of data.microbatch_size"
            )
        return {
            "version": _STATE_VERSION,
            "num_microbatches": num_chunks,
            "fingerprint": dict(self._fingerprint),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next microbatches are bitwise those of that run.

        The number of data ranks and the rows of a forward may differ from those of the run that saved.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: the state is of another text, tokenizer, shape or order, or its position does not
                divide among the data ranks.
        """
        if state.get("version") != _STATE_VERSION or not {"num_microbatches", "fingerprint"} <= state.keys():
            raise ValueError(
                f"data state has keys {sorted(state)} and version {state.get('version')!r}, expected "
                f"version {_STATE_VERSION} of TokenLoader.state_dict(); resume with the trimtab that saved it"
            )
        saved = state["fingerprint"]
        changed = [
            f"{name} (saved {saved.get(name)!r}, now {value!r})"
            for name, value in self._fingerprint.items()
            if saved.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"the data differ from those of the checkpoint: {', '.join(changed)}; resuming would "
                f"not continue that run: restore the settings, or start a new run from its weights alone"
            )
        num_microbatches = int(state["num_microbatches"])
        at_once = self._world_size * self.microbatch_size
        if num_microbatches * self._chunk_size % at_once:
            raise ValueError(
                f"the checkpoint was taken after {num_microbatches} microbatches, which do not divide among "
                f"{self._world_size} data ranks; resume with a number of data ranks that divides it"
            )
        self._num_read = num_microbatches * self._chunk_size // at_once

    def _stream(self, store: TokenStore, domain_ids: list[int], *, shuffle: bool) -> RowStream:
        """Rows of the documents of some domains."""
        part = store
        if len(domain_ids) < len(store.domains):
            part = store.select(np.flatnonzero(np.isin(store.domain_ids_D, domain_ids)))
        permute: Permute = in_order
        if shuffle:
            permute = shuffled(self.config.seed, _DOCUMENT_ORDER, domain_ids[0])
        if not self.config.packing:
            return PaddedRows(part, self.config.seq_len, permute)
        return (WholeRows if part.whole else PackedRows)(part, self.config.seq_len, permute)

    def _locate(self, number: int) -> tuple[int, int]:
        """Stream of a chunk of the run, and which chunk of that stream it is."""
        if len(self._streams) == 1:
            return 0, number
        cycle, position = divmod(number, self.microbatches_per_epoch)
        if cycle not in self._cycles:
            self._cycles = {cycle: self._schedule(cycle)}
        streams, numbers = self._cycles[cycle]
        return int(streams[position]), int(numbers[position])

    def _schedule(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order of the streams' chunks in a cycle.

        Stratified: a stream with n chunks has one at a random moment of each n-th of the cycle. So
        every stretch of the run holds the domains in proportion, and nobody can tell which one is next.
        """
        total = self.microbatches_per_epoch
        streams = np.repeat(np.arange(len(self._streams)), self._per_cycle)
        starts = np.cumsum(self._per_cycle) - self._per_cycle
        index = np.arange(total) - starts[streams]
        jitter = np.full(total, 0.5)
        if self.config.shuffle:
            words = random_words(total, self.config.seed, _SCHEDULE, 0, cycle)
            jitter = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort((index + jitter) / self._per_cycle[streams], kind="stable")
        return streams[order], (index + cycle * self._per_cycle[streams])[order]


def _tokens_per_domain(store: TokenStore) -> dict[str, int]:
    counts = np.bincount(store.domain_ids_D, weights=store.lengths_D, minlength=len(store.domains))
    return {name: int(count) for name, count in zip(store.domains, counts, strict=True)}
