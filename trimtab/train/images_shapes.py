"""Images that are drawn: coloured shapes on grey, with captions that only their images can tell.

Needs no download. Every image has one shape, in one of five places; a document has one image or several, and its
caption names the shape, the colour and the place of each, in order. Images have different sizes. What document
number n shows is a function of the configuration and n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.train.corpus import Document, load_fixed_corpus
from trimtab.train.images import ImageLayout, Picture
from trimtab.train.packing import random_words

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 170, 60),
    "blue": (40, 70, 220),
    "yellow": (230, 210, 40),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("square", "disc", "cross")
# Centre of the shape as shares of the image's height and width.
PLACES: dict[str, tuple[float, float]] = {
    "middle": (0.5, 0.5),
    "top left": (0.25, 0.25),
    "top right": (0.25, 0.75),
    "bottom left": (0.75, 0.25),
    "bottom right": (0.75, 0.75),
}
_GREY = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesConfig:
    """Drawn images with captions, and text without images.

    Args:
        num_documents: captions, each of one image or several.
        max_images: images of a document, at most.
        min_side: visual tokens of an image's side, at least.
        max_side: likewise, at most.
        text: also give the text that is shipped with trimtab, as a domain of its own.
        seed: of what is drawn.

    Raises:
        ValueError: a number below 1, or sides the wrong way round.
    """

    num_documents: int = 2_000
    max_images: int = 2
    min_side: int = 2
    max_side: int = 3
    text: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        for name, least in (("num_documents", 2), ("max_images", 1), ("min_side", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least {least}; raise data.images.shapes.{name}"
                )
        if self.max_side < self.min_side:
            raise ValueError(
                f"max_side={self.max_side} must be at least min_side={self.min_side}; change "
                "data.images.shapes.max_side"
            )

    def build(self, layout: ImageLayout) -> Iterator[tuple[Document, tuple[Picture, ...]]]:
        """Documents with their pictures, which come before the caption.

        Args:
            layout: how the model cuts images.
        """
        for number in range(self.num_documents):
            words = random_words(1 + 5 * self.max_images, self.seed, number)
            num_images = 1 + int(words[0] % np.uint64(self.max_images))
            drawings = [
                self._drawing(words[1 + 5 * i : 6 + 5 * i], layout, f"{self.seed}/{number}/{i}")
                for i in range(num_images)
            ]
            caption = "; ".join(drawing.caption for drawing in drawings)
            yield Document(text=f"{caption}.", domain="shapes", name=f"shapes/{number}"), tuple(drawings)
        if self.text:
            for document in load_fixed_corpus():
                yield Document(text=document.text, domain="text", name=document.name), ()

    def _drawing(self, words: NDArray[np.uint64], layout: ImageLayout, key: str) -> Drawing:
        shape, colour, place, *sides = (int(word >> np.uint64(11)) for word in words)
        spread = self.max_side - self.min_side + 1
        height, width = (self.min_side + side % spread for side in sides)
        return Drawing(
            layout=layout,
            shape=SHAPES[shape % len(SHAPES)],
            colour=tuple(COLOURS)[colour % len(COLOURS)],
            place=tuple(PLACES)[place % len(PLACES)],
            cells=(height, width),
            key=key,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One drawn image.

    Args:
        layout: how the model cuts it.
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        place: one of `PLACES`.
        cells: (height, width) in visual tokens.
        key: names the image.
    """

    layout: ImageLayout
    shape: str
    colour: str
    place: str
    cells: tuple[int, int]
    key: str

    @property
    def name(self) -> str:
        """What it shows."""
        return f"{self.key}: {self.caption} {self.cells}"

    @property
    def caption(self) -> str:
        """What a caption says of it."""
        return f"{self.colour} {self.shape}, {self.place}"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches, (height, width)."""
        height, width = self.cells
        return height * self.layout.merge_size, width * self.layout.merge_size

    def pixels(self) -> NDArray[np.uint8]:
        """(height, width, 3) the image."""
        height, width = (side * self.layout.cell for side in self.cells)
        centre_y, centre_x = PLACES[self.place]
        y = np.abs(np.arange(height)[:, None] + 0.5 - centre_y * height)
        x = np.abs(np.arange(width)[None, :] + 0.5 - centre_x * width)
        radius = 0.22 * min(height, width)
        inside = {
            "square": np.maximum(y, x) <= 0.9 * radius,
            "disc": y**2 + x**2 <= radius**2,
            "cross": (np.minimum(y, x) <= 0.35 * radius) & (np.maximum(y, x) <= radius),
        }[self.shape]
        image = np.full((height, width, 3), _GREY, np.uint8)
        image[inside] = COLOURS[self.colour]
        return image

    def patches(self) -> NDArray[np.float32]:
        """(P, X) values."""
        return self.layout.patches(self.pixels())
