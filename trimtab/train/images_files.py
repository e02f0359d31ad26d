"""Images of the user's files: records with a text and the paths of its images.

The images are opened when the loader is built, to know their sizes, and read when a microbatch shows them. They are
scaled and cut by transformers' own image processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.train.corpus import Document
from trimtab.train.images import ImageLayout, Picture
from trimtab.train.images_store import ImageDocument, ImagesConfig
from trimtab.train.sources import Record, find_files, read_records

# Tag of Exif that says how a camera was held; above 4, height and width change places.
_ORIENTATION = 0x0112
_INSTALL = "images need the package pillow; install it with: pip install pillow"


def read_image_documents(
    sources: Sequence[str],
    config: ImagesConfig,
    layout: ImageLayout,
    *,
    text_field: str = "text",
    domain_field: str = "domain",
) -> Iterator[ImageDocument]:
    """Stream the records of `.jsonl` and `.parquet` files, each a text with its images.

    Args:
        sources: files, directories or `domain=path`, as for text.
        config: which field names images, and how large they may be.
        layout: how the model cuts images.
        text_field: field or column that holds the text.
        domain_field: optional field or column that holds the document's domain.

    Raises:
        ValueError: a file or an image cannot be read, or a record is not what is expected; names file and line.
    """
    for file in find_files(sources):
        # One file at a time: paths of images are relative to it.
        given = f"{file.domain}={file.path}"
        for record in read_records(
            [given], field=text_field, optional=(config.image_field,), domain_field=domain_field
        ):
            text = record.values[text_field]
            if not isinstance(text, str) or not text:
                raise ValueError(
                    f"{record.place}: field {text_field!r} must be text, got {text!r}; repair or delete the record"
                )
            pictures = tuple(
                _picture(path, file.path.parent, record, config, layout) for path in _paths(record, config)
            )
            yield Document(text=text, domain=record.domain, name=record.name), pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePicture:
    """An image in a file.

    Args:
        layout: how the model cuts it.
        path: the file.
        name: as the record has it.
        grid: patches, (height, width), after scaling.
        min_pixels: as in `ImagesConfig`.
        max_pixels: likewise.
    """

    layout: ImageLayout
    path: Path
    name: str
    grid: tuple[int, int]
    min_pixels: int
    max_pixels: int

    def patches(self) -> NDArray[np.float32]:
        """(P, X) values.

        Raises:
            ValueError: the file cannot be read any more, or is another.
        """
        processor = _processor(self.layout, self.min_pixels, self.max_pixels)
        with _opened(self.path, self.name) as image:
            from PIL import ImageOps

            found = processor(images=[ImageOps.exif_transpose(image)], return_tensors="np")
        if (grid := tuple(found["image_grid_thw"][0, 1:].tolist())) != self.grid:
            raise ValueError(f"image {self.path} has changed while training: {grid} patches, was {self.grid}")
        patches: NDArray[np.float32] = found["pixel_values"]
        return patches


@cache
def _processor(layout: ImageLayout, min_pixels: int, max_pixels: int) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=layout.patch_size,
        merge_size=layout.merge_size,
        temporal_patch_size=layout.temporal_patch_size,
        image_mean=[layout.mean] * 3,
        image_std=[layout.std] * 3,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )


def _paths(record: Record, config: ImagesConfig) -> list[str]:
    value = record.values.get(config.image_field)
    if value is None:
        return []
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(
            f"{record.place}: field {config.image_field!r} must be the path of an image or a list of paths, got "
            f"{value!r}; repair or delete the record"
        )
    return paths


def _picture(path: str, folder: Path, record: Record, config: ImagesConfig, layout: ImageLayout) -> Picture:
    place = folder / Path(path).expanduser()
    height, width = _size(place, record.place)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        scaled = smart_resize(
            height, width, factor=layout.cell, min_pixels=config.min_pixels, max_pixels=config.max_pixels
        )
    except ValueError as error:
        raise ValueError(f"{record.place}: image {path!r} of {width} x {height} pixels: {error}") from error
    return FilePicture(
        layout=layout,
        path=place,
        name=path,
        grid=(scaled[0] // layout.patch_size, scaled[1] // layout.patch_size),
        min_pixels=config.min_pixels,
        max_pixels=config.max_pixels,
    )


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    """An image whose pixels are not read yet."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{where}: {_INSTALL}") from error
    try:
        with Image.open(path) as image:
            yield image
    except OSError as error:
        raise ValueError(
            f"{where}: image {path} cannot be read ({error}); paths are relative to the file that names them"
        ) from error


def _size(path: Path, where: str) -> tuple[int, int]:
    """Height and width of an image, turned as its camera was held."""
    with _opened(path, where) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION, 1) > 4 else (height, width)
