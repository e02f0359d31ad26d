"""Documents with images as tokens, and what a user says of such data.

A document is one text and the images that belong to it, in order. Where the text holds the marker, images stand in
its places; else they come before the text.

Shape suffix: N tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from trimtab.train.corpus import Document
from trimtab.train.images import ImageLayout, Picture, Pictures
from trimtab.train.images_shapes import ShapesConfig
from trimtab.train.token_store import TokenStore, name_hash
from trimtab.train.tokenizer import Tokenizer

ImageDocument = tuple[Document, tuple[Picture, ...]]
# Texts handed to the tokenizer at once.
_BATCH_DOCUMENTS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagesConfig:
    """Data with images, for a vision-language model.

    Args:
        enable: records of the user's files name images. Not needed for ``data.source=shapes``.
        image_field: field or column with the path of a document's image, or a list of paths, relative to the
            file's folder; documents without are text.
        marker: what stands in a text where an image belongs.
        min_pixels: smaller images are scaled up to it.
        max_pixels: larger images are scaled down to it; ``model.image_layout`` says how many are one token.
        shapes: what is drawn for ``data.source=shapes``.

    Raises:
        ValueError: an empty name, or bounds that are not.
    """

    enable: bool = False
    image_field: str = "image"
    marker: str = "<image>"
    # Of the released processors (preprocessor_config.json of Qwen/Qwen3-VL-30B-A3B-Instruct).
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    shapes: ShapesConfig = field(default_factory=ShapesConfig)

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("image_field", "marker"):
            if not getattr(self, name):
                raise ValueError(f"{name}='' is empty; set data.images.{name}")
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} must be in [1, max_pixels={self.max_pixels}]; change "
                "data.images.min_pixels"
            )
        named = [f for f in fields(self) if f.name not in ("enable", "shapes")]
        changed = [f.name for f in named if getattr(self, f.name) != f.default]
        if changed and not self.enable:
            warnings.warn(f"data.images.{changed[0]} has no effect without data.images.enable", stacklevel=3)


def tokenize_images(
    documents: Iterable[ImageDocument],
    tokenizer: Tokenizer,
    layout: ImageLayout,
    *,
    seq_len: int,
    marker: str,
    add_bos: bool = False,
) -> TokenStore:
    """Tokens of documents with images: [bos] + text and images + eos each.

    Args:
        documents: consumed once, in order.
        tokenizer: of the text.
        layout: how images are cut, and the tokens that stand for them.
        seq_len: S; text without images is cut into documents of as many tokens, a document with images is not.
        marker: as in `ImagesConfig`.
        add_bos: open each document with the tokenizer's bos.

    Returns:
        Documents of at most S tokens, none to be divided; labels are text.

    Raises:
        ValueError: there are no documents, markers and images do not match, a document with images is longer than
            S, or text holds tokens that stand for images.
    """
    if add_bos and tokenizer.bos_id is None:
        raise ValueError(
            "add_bos=True needs a tokenizer with a bos token, and this one has none; set it False"
        )
    bos = [np.array([tokenizer.bos_id], np.int64)] if add_bos else []
    eos = np.array([tokenizer.eos_id], np.int64)
    pictures: list[Picture] = []
    tokens: list[NDArray[np.int64]] = []
    images: list[NDArray[np.int32]] = []
    names: list[tuple[str, int]] = []
    for batch in _batched(documents, _BATCH_DOCUMENTS):
        texts = [_texts(document, shown, marker) for document, shown in batch]
        encoded = iter(tokenizer.encode_batch([text for parts in texts for text in parts]))
        for (document, shown), parts in zip(batch, texts, strict=True):
            text_ids = [next(encoded).astype(np.int64) for _ in parts]
            _check_text(document, text_ids, layout)
            ids, numbers = _interleave(text_ids, shown, layout, len(pictures))
            pictures += shown
            ids = np.concatenate([*bos, ids, eos])
            numbers = np.pad(numbers, (len(bos), 1), constant_values=-1)
            if shown and len(ids) > seq_len:
                raise ValueError(
                    f"document {document.name!r} has {len(ids)} tokens with its {len(shown)} images, which do not "
                    f"fit into data.seq_len={seq_len}; raise it, or lower data.images.max_pixels"
                )
            for first in range(0, len(ids), seq_len):
                tokens.append(ids[first : first + seq_len])
                images.append(numbers[first : first + seq_len])
                names.append((document.domain, name_hash(f"{document.domain}\n{document.name}")))
    if not names:
        raise ValueError("the source holds no documents; give at least one text")
    domains = tuple(sorted({domain for domain, _ in names}))
    tokens_N = np.concatenate(tokens)
    markers = (layout.start_id, layout.image_id, layout.end_id)
    fits = max(tokenizer.vocab_size - 1, *markers) < 2**16
    return TokenStore(
        tokens_N=tokens_N.astype(np.uint16 if fits else np.uint32),
        offsets_D=np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(np.int64),
        domain_ids_D=np.array([domains.index(domain) for domain, _ in names], dtype=np.int64),
        order_D=np.array([order for _, order in names], dtype=np.uint64),
        domains=domains,
        predicted_N=~np.isin(tokens_N, markers),
        whole=True,
        images_N=np.concatenate(images),
        pictures=Pictures(layout, tuple(pictures)),
    )


def _texts(document: Document, shown: Sequence[Picture], marker: str) -> list[str]:
    """Text before, between and after images."""
    parts = document.text.split(marker) if shown else [document.text]
    if len(parts) == 1:
        return [*[""] * len(shown), *parts]
    if len(parts) != len(shown) + 1:
        raise ValueError(
            f"document {document.name!r} has {len(shown)} images and {len(parts) - 1} markers {marker!r}; give one "
            "for each image, or none for images before the text"
        )
    return parts


def _interleave(
    texts: Sequence[NDArray[np.int64]], shown: Sequence[Picture], layout: ImageLayout, first: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids of a document, and which image each is of."""
    ids, numbers = [texts[0]], [np.full(len(texts[0]), -1, np.int32)]
    for number, (picture, text) in enumerate(zip(shown, texts[1:], strict=True), start=first):
        image = layout.token_ids(picture.grid)
        ids += [image, text]
        numbers.append(np.where(image == layout.image_id, number, -1).astype(np.int32))
        numbers.append(np.full(len(text), -1, np.int32))
    return np.concatenate(ids), np.concatenate(numbers)


def _check_text(document: Document, texts: Sequence[NDArray[np.int64]], layout: ImageLayout) -> None:
    markers = (layout.start_id, layout.image_id, layout.end_id)
    for ids in texts:
        found = ids[np.isin(ids, markers)]
        if len(found):
            raise ValueError(
                f"document {document.name!r} has token {found[0]} in its text, which stands for images; write the "
                "marker data.images.marker where an image belongs"
            )


def _batched(documents: Iterable[ImageDocument], size: int) -> Iterator[list[ImageDocument]]:
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
