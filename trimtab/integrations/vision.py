"""Vision towers of transformers models in a trainer: every forward runs them alike, on every rank.

Shapes: B sequences, S length, D model width, I images, P patches, X values of a patch, N visual tokens.

A stock model leaves its tower out where it is given no images, and fails if it is given none of them. Ranks that
share the tower's parameters would then do different things, and wait for each other forever; gradients of some
would be missing. So a prepared model that is given zero images shows its tower one blank image, and takes zero rows
of what comes out: nothing is added, backward passes the tower, and its gradients are zeros.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn


def tower_of(model: nn.Module) -> str | None:
    """Name of a model's vision tower; None if it has none that is known.

    It is the child ``visual`` of the module whose ``get_image_features`` calls it.
    """
    for name, module in model.named_modules():
        if hasattr(module, "get_image_features") and isinstance(getattr(module, "visual", None), nn.Module):
            return f"{name}.visual" if name else "visual"
    return None


def tower_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model's vision tower; none where a model or pipeline stage has no tower."""
    name = tower_of(model)
    blocks = None if name is None else getattr(model.get_submodule(name), "blocks", None)
    # A pipeline stage has a stand-in without parameters where another stage has the tower.
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def prepare_vision(model: nn.Module) -> None:
    """Let a model take zero images, in place; parameters, hooks and names stay.

    Raises:
        ValueError: the model has no vision tower that is known.
    """
    name = tower_of(model)
    if name is None:
        raise ValueError(
            f"{type(model).__name__} has no module that holds a tower `visual` and has `get_image_features`; only "
            "such models can be trained on images"
        )
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    # A class and not a replaced method: it pickles, copies and compiles as any other.
    owner.__class__ = _taking_none(cast(Any, type(owner)))


def image_arguments(
    position_ids_BS: Tensor,
    positions_3BS: Tensor,
    patches_PX: Tensor | None = None,
    grids_I3: Tensor | None = None,
) -> dict[str, Tensor]:
    """Arguments of a model's forward for a batch with images.

    Args:
        position_ids_BS: (B, S) places in each document, which tell documents apart.
        positions_3BS: (3, B, S) rotary positions.
        patches_PX: (P, X) patches of all images, for a model or stage that has the tower.
        grids_I3: (I, 3) frames, height and width of each image in patches, likewise.

    Returns:
        ``position_ids`` (4, B, S), and ``pixel_values`` and ``image_grid_thw`` where there are patches.
    """
    arguments = {"position_ids": torch.cat([position_ids_BS[None], positions_3BS])}
    if patches_PX is not None and grids_I3 is not None:
        arguments |= {"pixel_values": patches_PX, "image_grid_thw": grids_I3}
    return arguments


@cache
def _taking_none(owner: Any) -> type[nn.Module]:
    if issubclass(owner, _TakesNone):
        return cast(type[nn.Module], owner)
    return type(owner.__name__, (_TakesNone, owner), {"__module__": __name__})


class _TakesNone(nn.Module):
    """Mixed into the module that calls a vision tower."""

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        """Features of the images, as the stock model gives them; of none, zero rows of a blank image's."""
        stock: Any = super().get_image_features  # type: ignore[misc]
        if len(image_grid_thw):
            return stock(pixel_values, image_grid_thw, **kwargs)
        side: int = cast(Any, self).visual.spatial_merge_size
        blank = pixel_values.new_zeros(side**2, pixel_values.shape[1])
        grid = image_grid_thw.new_tensor([[1, side, side]])
        features = stock(blank, grid, **kwargs)
        features.pooler_output = [rows_ND[:0] for rows_ND in features.pooler_output]
        if getattr(features, "deepstack_features", None) is not None:
            features.deepstack_features = [
                [rows[:0] for rows in level] for level in features.deepstack_features
            ]
        return features


class FixedTower(nn.Module):
    """Stands in for a vision tower: answers with features that are fixed.

    Args:
        replaced: the tower.
        width: D.
        dtype: of the features.
    """

    def __init__(self, replaced: Any, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.spatial_merge_size: int = replaced.spatial_merge_size
        self.dtype = dtype
        self.width = width
        self.num_levels = len(getattr(replaced, "deepstack_visual_indexes", ()))

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Random features of as many visual tokens, and as many levels of them, as the tower has."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        num_tokens = len(hidden_states) // self.spatial_merge_size**2
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(1 + self.num_levels, num_tokens, self.width, generator=generator)
        last, *levels = drawn.to(hidden_states.device, self.dtype)
        features: Any = BaseModelOutputWithPooling(pooler_output=last)
        features.deepstack_features = levels
        return features


def sample_images(model: Any, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Arguments of a model's forward for (B, S) tokens, of which each row's second is visual: one small image.

    Args:
        model: a model with a tower.
        shape: (B, S), with S at least 3.
    """
    num_rows, length = shape
    side: int = model.get_submodule(tower_of(model)).spatial_merge_size
    ids_BS = torch.ones(shape, dtype=torch.int64)
    ids_BS[:, 1] = model.config.image_token_id
    places_BS = torch.arange(length).expand(shape)
    return {
        "input_ids": ids_BS,
        **image_arguments(
            places_BS,
            places_BS.expand(3, *shape),
            torch.zeros(num_rows * side**2, _patch_dim(model)),
            torch.tensor([[1, side, side]]).repeat(num_rows, 1),
        ),
    }


def _patch_dim(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
