"""Images as a vision-language model takes them: patches, the tokens that stand for them, and their positions.

Shapes: B rows, S tokens of a row, I images of a microbatch, P patches of them, X values of a patch (channels,
frames, height and width of the patch).

An image is cut into square patches, and the model makes one token of ``merge_size``² neighbouring ones. In a
row those tokens stand between two that mark the beginning and the end of the image. What is predicted is text
alone: neither visual tokens nor the two around them are labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLayout:
    """How a model cuts images, and the tokens that stand for them in its vocabulary.

    Args:
        patch_size: pixels of a patch's side.
        merge_size: patches of a visual token's side.
        temporal_patch_size: frames of a patch; a still image is repeated as often.
        start_id: token that opens an image.
        image_id: token that stands for each visual token.
        end_id: token that closes an image.
        mean: of a channel's values in [0, 1], subtracted.
        std: of a channel's values, divided by.

    Raises:
        ValueError: sizes below 1, or tokens that are not different.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    start_id: int
    image_id: int
    end_id: int
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("patch_size", "merge_size", "temporal_patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        ids = (self.start_id, self.image_id, self.end_id)
        if len(set(ids)) < 3 or min(ids) < 0:
            raise ValueError(f"start_id, image_id, end_id = {ids} must be three different tokens")

    @property
    def cell(self) -> int:
        """Pixels of a visual token's side; the sides of images are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """X, of three channels."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Visual tokens of an image of so many patches (height, width)."""
        return grid[0] * grid[1] // self.merge_size**2

    def token_ids(self, grid: tuple[int, int]) -> NDArray[np.int64]:
        """Tokens that stand for an image in a row, those that mark it included."""
        return np.array([self.start_id, *[self.image_id] * self.num_tokens(grid), self.end_id])

    def patches(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Cut an image whose sides are multiples of `cell`.

        Args:
            pixels: (height, width, 3) red, green, blue.

        Returns:
            (P, X) normalised values. Patches of one visual token follow each other, row by row, and visual
            tokens likewise; values of a patch are in the order channel, frame, row, column.

        Raises:
            ValueError: the sides do not fit.

        Source: the layout of transformers' `Qwen2VLImageProcessor`, to which a test compares it.
        """
        height, width = pixels.shape[:2]
        if height % self.cell or width % self.cell or pixels.shape[2:] != (3,):
            raise ValueError(
                f"an image of shape {pixels.shape} must have sides that are multiples of patch_size * merge_size = "
                f"{self.cell}, and 3 channels; resize it first"
            )
        values = (pixels.astype(np.float32) / np.float32(255) - np.float32(self.mean)) / np.float32(self.std)
        rows, columns, m, p = height // self.cell, width // self.cell, self.merge_size, self.patch_size
        cut = values.reshape(rows, m, p, columns, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        frames = np.repeat(cut[:, :, :, :, :, None], self.temporal_patch_size, axis=5)
        return frames.reshape(-1, self.patch_dim)


class Picture(Protocol):
    """One image of a document. Its values are made when a microbatch needs them."""

    @property
    def name(self) -> str:
        """What it shows, or where it is from: equal names are equal images."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches, (height, width)."""

    def patches(self) -> NDArray[np.float32]:
        """(P, X) values, as from `ImageLayout.patches`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageInputs:
    """The images of one microbatch; there may be none.

    Args:
        patches_PX: (P, X) float32 of all images in the order of their tokens, row by row; none on pipeline ranks
            without the vision tower.
        grids_I3: (I, 3) int64 frames, height and width of each image in patches.
        visual_mask_BS: (B, S) bool, True at visual tokens.
        positions_3BS: (3, B, S) int64 rotary positions in time, height and width, from 0 in each segment.
    """

    patches_PX: Tensor
    grids_I3: Tensor
    visual_mask_BS: Tensor
    positions_3BS: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> ImageInputs:
        """The same images with each tensor replaced by what the function makes of it."""
        return ImageInputs(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """The images of a set of documents; tokens name them by their numbers.

    Args:
        layout: how they are cut.
        pictures: the images.
    """

    layout: ImageLayout
    pictures: tuple[Picture, ...]

    def fingerprint(self) -> str:
        """Hash of what is shown, and of how it is cut."""
        digest = hashlib.blake2b(repr(self.layout).encode(), digest_size=16)
        for picture in self.pictures:
            digest.update(f"{picture.name}\n{picture.grid}\n".encode())
        return digest.hexdigest()

    def to_inputs(
        self, images_BS: NDArray[np.int64], positions_BS: NDArray[np.int64], *, patches: bool = True
    ) -> ImageInputs:
        """What the model is given of some rows.

        Args:
            images_BS: (B, S) image that a token is part of; -1 of text, of the tokens around an image and of
                padding.
            positions_BS: (B, S) place of each token in its segment.
            patches: read and cut the images; False leaves ``patches_PX`` empty.

        Raises:
            ValueError: rows hold a part of an image, or an image cannot be read.
        """
        before_BS = np.pad(images_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        rows_I, columns_I = np.nonzero((images_BS >= 0) & (images_BS != before_BS))
        shown = [self.pictures[number] for number in images_BS[rows_I, columns_I]]
        positions_3BS = np.repeat(positions_BS[None], 3, axis=0)
        for row, column, picture in zip(rows_I.tolist(), columns_I.tolist(), shown, strict=True):
            height, width = (side // self.layout.merge_size for side in picture.grid)
            after = column + height * width
            if len(set(images_BS[row, column:after])) > 1 or after > images_BS.shape[1]:
                raise ValueError(f"a row holds a part of image {picture.name!r} only; raise data.seq_len")
            _place(positions_3BS[:, row], positions_BS[row], column, height, width)
        empty = np.zeros((0, self.layout.patch_dim), np.float32)
        values = [picture.patches() for picture in shown] if patches else []
        return ImageInputs(
            patches_PX=torch.from_numpy(np.concatenate([empty, *values])),
            grids_I3=torch.tensor([(1, *picture.grid) for picture in shown], dtype=torch.int64).view(-1, 3),
            visual_mask_BS=torch.from_numpy(images_BS >= 0),
            positions_3BS=torch.from_numpy(positions_3BS),
        )


def _place(
    positions_3S: NDArray[np.int64], places_S: NDArray[np.int64], column: int, height: int, width: int
) -> None:
    """Set the rotary positions of an image's tokens, and move those of the text after it in its segment.

    A visual token's are those of the image's first one plus its row and its column. Text goes on from the largest
    of them, so that an image takes as many positions as its longer side has tokens.
    """
    after = column + height * width
    starts = np.flatnonzero(places_S[after:] == 0)
    end = after + starts[0] if len(starts) else len(places_S)
    first = positions_3S[0, column]
    positions_3S[:, after:end] -= height * width - max(height, width)
    positions_3S[0, column:after] = first
    positions_3S[1, column:after] = first + np.repeat(np.arange(height), width)
    positions_3S[2, column:after] = first + np.tile(np.arange(width), height)
