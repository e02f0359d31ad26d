"""The source of a run with images: checked, read and tokenised."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from trimtab.train.images import ImageLayout
from trimtab.train.images_files import read_image_documents
from trimtab.train.images_shapes import ShapesConfig
from trimtab.train.images_store import tokenize_images
from trimtab.train.token_store import TokenStore
from trimtab.train.tokenizer import Tokenizer

if TYPE_CHECKING:
    from trimtab.train.data import DataConfig


def check_images(data: DataConfig) -> None:
    """Check what a configuration says of images.

    Raises:
        ValueError: it contradicts itself.
    """
    if data.chat.enable and data.has_images:
        raise ValueError(
            "data.chat.enable: conversations are of text, and this source has images; leave it out, or "
            "data.images.enable and data.source=shapes"
        )
    if data.images.enable and data.source in ("embedded", "fixed", "shapes"):
        raise ValueError(
            f"data.images.enable is for files that name images, and source={data.source!r} has none; give "
            "data.source files, or leave it out"
        )
    if data.source != "shapes" and data.images.shapes != ShapesConfig():
        warnings.warn(f"data.images.shapes has no effect with source={data.source!r}", stacklevel=4)


def read_images(
    data: DataConfig, tokenizer: Tokenizer, image_layout: Callable[[int], ImageLayout] | None
) -> TokenStore:
    """Tokens of a source with images.

    Args:
        data: what to read.
        tokenizer: of the text.
        image_layout: how the model cuts images, given the tokenizer's number of ids; None: it takes none.

    Raises:
        ValueError: the model takes no images, or the source cannot be read.
    """
    if image_layout is None:
        raise ValueError(f"data.source={data.source!r} has images, and the model takes none")
    layout = image_layout(tokenizer.vocab_size)
    if data.source == "shapes":
        documents = data.images.shapes.build(layout)
    else:
        documents = read_image_documents(
            data.paths, data.images, layout, text_field=data.text_field, domain_field=data.domain_field
        )
    return tokenize_images(
        documents, tokenizer, layout, seq_len=data.seq_len, marker=data.images.marker, add_bos=data.add_bos
    )
