"""What vision-language families have in common: a vision tower in front of a language model.

The tower is on the first pipeline stage. Where its features are added after decoder layers too (DeepStack, Meng et
al. 2024, arXiv:2406.04334), so are those layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from trimtab.integrations.vision import prepare_vision
from trimtab.train.hf_model import HFModelConfig
from trimtab.train.images import ImageLayout

_WHOLE = "images are placed into whole sequences, with positions in three axes"


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTowerConfig:
    """Sizes of a vision tower; its output has the width of the language model.

    Args:
        depth: blocks.
        dim: width.
        hidden_dim: hidden width of feed-forwards.
        num_heads: attention heads; divides ``dim`` into widths that are multiples of 4.
        patch_size: pixels of a patch's side.
        merge_size: patches of a visual token's side.
        temporal_patch_size: frames of a patch.
        num_positions: learned positions, a square number: images of other sizes interpolate between them.
        deepstack: blocks whose features are added after decoder layers: those of the first after the first layer.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    depth: int
    dim: int
    hidden_dim: int
    num_heads: int
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    num_positions: int = 2304
    deepstack: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1; raise model.vision.{field.name}")
        if self.dim % (4 * self.num_heads):
            raise ValueError(
                f"dim={self.dim} must be a multiple of 4 * num_heads={4 * self.num_heads}; change model.vision.dim"
            )
        if round(self.num_positions**0.5) ** 2 != self.num_positions:
            raise ValueError(
                f"num_positions={self.num_positions} must be a square number; change model.vision.num_positions"
            )
        if list(self.deepstack) != sorted({block for block in self.deepstack if 0 <= block < self.depth}):
            raise ValueError(
                f"deepstack={self.deepstack} must be increasing numbers of blocks in [0, depth={self.depth}); "
                "change model.vision.deepstack"
            )

    def hf_config(self, width: int, init_std: float) -> dict[str, Any]:
        """Fields that transformers' configurations share.

        Args:
            width: of the language model.
            init_std: standard deviation of initial weights.
        """
        return {
            "depth": self.depth,
            "hidden_size": self.dim,
            "intermediate_size": self.hidden_dim,
            "num_heads": self.num_heads,
            "patch_size": self.patch_size,
            "spatial_merge_size": self.merge_size,
            "temporal_patch_size": self.temporal_patch_size,
            "num_position_embeddings": self.num_positions,
            "out_hidden_size": width,
            "initializer_range": init_std,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTokens:
    """Ids of the tokens that stand for images.

    Args:
        start: opens an image.
        image: stands for a visual token.
        end: closes an image.
        video: stands for a visual token of a video, which is not trained on.
    """

    start: int
    image: int
    end: int
    video: int


class VisionLanguage(HFModelConfig):
    """What a family with a vision tower adds to its text model. It has the fields that are named here.

    Args:
        vision: sizes of the vision tower.
        vision_tokens: ids of the tokens that stand for images; None takes the last four of the embedding, beyond
            those of the tokenizer.
    """

    __slots__ = ()
    vision: VisionTowerConfig
    vision_tokens: VisionTokens | None

    refused_axes: ClassVar[Mapping[str, str]] = {"tp": _WHOLE, "cp": _WHOLE}
    tp_divides: ClassVar[tuple[str, ...]] = ()

    def check_vision(self) -> None:
        """Check that the tower fits the decoder.

        Raises:
            ValueError: it has features for more layers than there are.
        """
        if len(self.vision.deepstack) > self.num_layers:
            raise ValueError(
                f"deepstack={self.vision.deepstack} are features for more layers than num_layers="
                f"{self.num_layers}; shorten model.vision.deepstack"
            )

    @property
    def takes_images(self) -> bool:
        """It does."""
        return True

    @property
    def num_first_stage_layers(self) -> int:
        """As many as features of images are added after."""
        return len(self.vision.deepstack)

    def tokens(self, num_embeddings: int) -> VisionTokens:
        """The tokens that stand for images, in an embedding of so many rows."""
        if self.vision_tokens is not None:
            return self.vision_tokens
        start, image, end, video = range(num_embeddings - 4, num_embeddings)
        return VisionTokens(start=start, image=image, end=end, video=video)

    def image_layout(self, vocab_size: int) -> ImageLayout:
        """How the tower cuts images."""
        tokens = self.tokens(self.num_embeddings(vocab_size))
        return ImageLayout(
            patch_size=self.vision.patch_size,
            merge_size=self.vision.merge_size,
            temporal_patch_size=self.vision.temporal_patch_size,
            start_id=tokens.start,
            image_id=tokens.image,
            end_id=tokens.end,
        )

    def num_embeddings(self, vocab_size: int) -> int:
        """Rows of the embedding: the tokenizer's ids and those that stand for images.

        Raises:
            ValueError: the model's own number is smaller.
        """
        if (tokens := self.vision_tokens) is None:
            return super().num_embeddings(vocab_size + 4)
        last = max(tokens.start, tokens.image, tokens.end, tokens.video)
        return super().num_embeddings(max(vocab_size, last + 1))

    def build(self, *, vocab_size: int, seq_len: int) -> nn.Module:
        """transformers' own model, which takes batches without images too."""
        model = super().build(vocab_size=vocab_size, seq_len=seq_len)
        prepare_vision(model)
        return model

    def token_fields(self, num_embeddings: int) -> dict[str, Any]:
        """The tokens as transformers' configurations name them, in an embedding of so many rows."""
        tokens = self.tokens(num_embeddings)
        return {
            "image_token_id": tokens.image,
            "video_token_id": tokens.video,
            "vision_start_token_id": tokens.start,
            "vision_end_token_id": tokens.end,
        }
