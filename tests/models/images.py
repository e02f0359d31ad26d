"""Images in the rows of a step: for the trainer as its loader gives them, for a stock model document by document.

Shapes: B rows, S tokens of a row, M microbatches, P patches of X values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parallel.reference import Step
from trimtab.train.images import ImageInputs, ImageLayout, Pictures

# Patches, (height, width), of images that follow each other.
GRIDS = ((2, 4), (4, 2), (4, 4))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of random values."""

    number: int
    grid: tuple[int, int]
    patch_dim: int

    @property
    def name(self) -> str:
        return f"image {self.number}"

    def patches(self) -> NDArray[np.float32]:
        generator = np.random.default_rng(self.number)
        return generator.standard_normal((self.grid[0] * self.grid[1], self.patch_dim), np.float32)


@dataclass(frozen=True, slots=True)
class Illustrated:
    """A step with images.

    Args:
        step: its rows, with the tokens of images in place of others.
        images_MBS: (M, B, S) number of the image that a token is part of, else -1.
        pictures: the images.
    """

    step: Step
    images_MBS: Tensor
    pictures: Pictures

    def inputs(self, m: int, rank: int, num_ranks: int) -> ImageInputs:
        """The images of one data rank in a microbatch."""
        positions_BS = self.step.microbatches[m].part(rank, num_ranks).position_ids
        images_BS = self.images_MBS[m].chunk(num_ranks)[rank]
        return self.pictures.to_inputs(images_BS.numpy(), positions_BS.numpy())

    def stock_arguments(self, images_S: Tensor) -> dict[str, Any]:
        """What a stock model is given of a document's images beside its tokens; nothing if it has none."""
        is_visual_S = images_S >= 0
        if not is_visual_S.any():
            return {}
        shown = [self.pictures.pictures[number] for number in images_S[is_visual_S].unique().tolist()]
        return {
            "pixel_values": torch.from_numpy(np.concatenate([picture.patches() for picture in shown])),
            "image_grid_thw": torch.tensor([(1, *picture.grid) for picture in shown]),
            "mm_token_type_ids": is_visual_S[None].int(),
        }


def illustrate(step: Step, layout: ImageLayout) -> Illustrated:
    """Put an image into every document of most microbatches that has room; the last microbatch has none."""
    images_MBS = torch.full((len(step.microbatches), *step.microbatches[0].input_ids.shape), -1)
    drawings: list[Drawing] = []
    microbatches = []
    for m, rows in enumerate(step.microbatches):
        ids, labels = rows.input_ids.clone(), rows.labels.clone()
        documents = pairwise(rows.cu_seqlens.tolist()) if m < len(step.microbatches) - 1 else ()
        for start, end in documents:
            number = len(drawings)
            grid = GRIDS[number % len(GRIDS)]
            tokens = torch.from_numpy(layout.token_ids(grid))
            if end - start < len(tokens) + 1:
                continue
            # After the first token, so that text comes before images as well as after.
            place = slice(start + 1, start + 1 + len(tokens))
            drawings.append(Drawing(number, grid, layout.patch_dim))
            ids.view(-1)[place] = tokens
            labels.view(-1)[start : start + len(tokens)] = -100
            images_MBS[m].view(-1)[place.start + 1 : place.stop - 1] = number
        microbatches.append(replace(rows, input_ids=ids, labels=_shifted(labels, ids)))
    return Illustrated(Step(tuple(microbatches)), images_MBS, Pictures(layout, tuple(drawings)))


def _shifted(labels: Tensor, ids: Tensor) -> Tensor:
    """Labels of the tokens that there are now."""
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    return torch.where(labels >= 0, following, labels)
