"""Replay: recorded experts in the place of the router's choice.

Shapes: T tokens, E experts, K top-k, B sequences, S length, L layers, M microbatches.

Ids are checked and laid out where they are given, on the host, once: `Replay` then hands one tensor to each
forward, in order. The weights are never replayed: `Weighing` forms them of the current logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.host_tensor import wait
from trimtab.records import RoutingRecords
from trimtab.routing import Routing, weigh
from trimtab.row import Row
from trimtab.scores import compute_dtype, scores

# By layer (T, K) or (B, S, K); None or -1 leaves a layer or a token to the router.
IdsByLayer = Mapping[str, Tensor | None]
Ids = RoutingRecords | IdsByLayer | Tensor | Sequence[IdsByLayer | Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing:
    """How a router weighs given experts.

    Args:
        routing: score function, normalisation, scale.
        epsilon: what the router adds to the sum that it divides by.
    """

    routing: Routing
    epsilon: float = 0.0

    def __call__(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """(T, K) weights of these experts, in the compute dtype. Gradient flows to the logits."""
        weights_TK = weigh(logits_TE, ids_TK, self.routing)
        if self.epsilon == 0.0:
            return weights_TK
        sums_T1 = scores(logits_TE, self.routing.score).gather(1, ids_TK).sum(dim=-1, keepdim=True)
        return weights_TK * (sums_T1 / (sums_T1 + self.epsilon))


class Replay:
    """Ids of every layer for the forwards to come, given out in order.

    Args:
        layers: of the model, as the ids are laid out.
        microbatches: of each the (L, T, K) ids, in few bytes, -1 where the router chooses.
        has_gaps: some id may be -1.
        lasts: hooks stay on the model after the block, where a backward may need them.
    """

    def __init__(
        self, layers: Sequence[Row], microbatches: Sequence[Tensor], has_gaps: bool, lasts: bool = True
    ) -> None:
        self.layers = tuple(layers)
        self.lasts = lasts
        self.has_gaps = has_gaps
        self.num_layers, self.top_k = len(layers), max(layer.top_k for layer in layers)
        self.dtype = microbatches[0].dtype
        self._microbatches = tuple(microbatches)
        self._given = {False: 0, True: 0}  # so far, to training (or other) forwards and to counting ones

    def take(self, num_tokens: int, counting: bool, device: torch.device) -> Tensor:
        """(L, T, K) ids of the next forward, on its device.

        Args:
            num_tokens: T of the forward.
            counting: it is one of a counting pass, which precedes the same forwards in training.
            device: of the forward's tokens.

        Raises:
            RuntimeError: every microbatch has been given out, or this one has another number of tokens.
        """
        number, total = self._given[counting], len(self._microbatches)
        if number == total:
            raise RuntimeError(
                f"forward {number + 1} runs inside replay_routing(...), which was given the ids of {total} "
                f"microbatch{'es' if total > 1 else ''}; give the ids of one for each forward in the block, or end "
                "the block before"
            )
        ids_LTK = self._microbatches[number]
        if ids_LTK.shape[1] != num_tokens:
            raise RuntimeError(
                f"forward {number + 1} inside replay_routing(...) has {num_tokens} tokens, but the ids given for "
                f"it are of {ids_LTK.shape[1]}; replay ids of the same tokens in the same order, padding as well, "
                "with -1 for those that have none"
            )
        self._given[counting] += 1
        return ids_LTK.to(device, non_blocking=True)

    def check_all_given(self) -> None:
        """Raise a RuntimeError if forwards are missing: later ids would have been meant for them."""
        total = len(self._microbatches)
        for counting, number in self._given.items():
            # A counting pass, or what follows it, may be in a block of its own.
            if number != total and not (number == 0 and self._given[not counting] == total):
                raise RuntimeError(
                    f"replay_routing(...) was given the ids of {total} microbatches, and {number} "
                    f"{'counting forwards' if counting else 'forwards'} ran in the block; run one forward for each"
                )


def replay_of(
    layers: Sequence[Row], ids: Sequence[IdsByLayer], device: torch.device, others: Sequence[str] = ()
) -> Replay:
    """Check ids and lay them out.

    Ids on the host are checked in full. Ids on a device would have to be waited for: of these shapes and names are
    checked, values are not, and -1 is understood.

    Args:
        layers: of the model, in order.
        ids: of each microbatch.
        device: that the model is on: its ids are put where copies to it do not wait.
        others: names that ids may have beside those of the layers.

    Raises:
        ValueError: names, shapes, dtypes or values that do not fit the layers.
    """
    names = [layer.name for layer in layers]
    microbatches, gaps = [], False
    for number, by_layer in enumerate(ids):
        where = f"ids of microbatch {number}"
        _check_names(where, by_layer, names, others)
        ids_LTK, has_gaps = _laid_out(where, layers, by_layer)
        gaps = gaps or has_gaps
        if device.type == "cuda" and ids_LTK.device.type == "cpu":
            ids_LTK = ids_LTK.pin_memory()
        microbatches.append(ids_LTK)
    if not microbatches:
        raise ValueError("replay_routing(...) was given the ids of no microbatch; give those of one or more")
    return Replay(layers, microbatches, gaps)


def by_layer_of(ids: Ids, names: Sequence[str]) -> list[IdsByLayer]:
    """The ids of each microbatch by layer.

    Args:
        ids: what the user gave; see `trimtab.replay_routing`.
        names: of the model's layers in order.

    Raises:
        ValueError: something else, or tensors of another number of layers.
    """
    if isinstance(ids, RoutingRecords):
        if "ids" not in ids.what:
            raise ValueError(
                f"replay_routing was given records of {ids.what}; record ids: record_routing(..., what=('ids',))"
            )
        records = ids
        return [
            {name: layer[number]["ids"] for name, layer in records.items() if number < len(layer)}
            for number in range(records.num_forwards)
        ]
    microbatches: Any = [ids] if isinstance(ids, Mapping) or _is_layers(ids) else ids
    if isinstance(microbatches, Tensor) and microbatches.dim() == 4:
        microbatches = microbatches.unbind(0)
    if isinstance(microbatches, Tensor) or not isinstance(microbatches, Sequence):
        raise ValueError(
            f"replay_routing was given {_kind(ids)}; expected records of record_routing, or for each microbatch "
            "{layer: (T, K) ids} or an (L, T, K) tensor, in a list or as one (M, L, T, K) tensor"
        )
    found: list[IdsByLayer] = []
    for number, one in enumerate(microbatches):
        if not (isinstance(one, Mapping) or _is_layers(one)):
            raise ValueError(
                f"ids of microbatch {number} are {_kind(one)}; expected {{layer: (T, K) ids}} or an "
                "(L, T, K) tensor"
            )
        if isinstance(one, Tensor) and one.shape[0] != len(names):
            raise ValueError(
                f"ids of microbatch {number} are of {one.shape[0]} layers, (L, T, K) = {tuple(one.shape)}, but "
                f"the model has L = {len(names)}: {_some(names)}"
            )
        found.append(dict(zip(names, one.unbind(0), strict=True)) if isinstance(one, Tensor) else one)
    return found


def _is_layers(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() == 3


def _kind(given: Any) -> str:
    return f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_names(where: str, by_layer: IdsByLayer, names: Sequence[str], others: Sequence[str]) -> None:
    missing = [name for name in names if name not in by_layer]
    if missing:
        raise ValueError(
            f"{where} lack {_some(missing)}; give the ids of every layer of this model, and None for one that is "
            "to choose by itself"
        )
    unknown = [name for name in by_layer if name not in names and name not in others]
    if unknown:
        raise ValueError(
            f"{where} are also of {_some(unknown)}, which this model does not have; it has {_some(names)}. Of a "
            "pipeline stage give the layers that it has"
        )


def _laid_out(where: str, layers: Sequence[Row], by_layer: IdsByLayer) -> tuple[Tensor, bool]:
    """(L, T, K) ids, and whether some may be -1."""
    top_k = max(layer.top_k for layer in layers)
    flat: list[Tensor | None] = []
    num_tokens, gaps = None, False
    for layer in layers:
        given = by_layer[layer.name]
        if given is None:
            flat.append(None)
            continue
        ids_TK = _flat(where, layer, wait(given))
        if num_tokens not in (None, ids_TK.shape[0]):
            raise ValueError(
                f"{where}: {layer.name} has ids of {ids_TK.shape[0]} tokens, layers before it of {num_tokens}; a "
                "forward runs the same tokens through every layer"
            )
        num_tokens = ids_TK.shape[0]
        gaps = _check_values(where, layer, ids_TK) or gaps
        flat.append(ids_TK)
    device = next((ids_TK.device for ids_TK in flat if ids_TK is not None), None)
    if device is None or num_tokens is None:
        raise ValueError(f"{where} are None for every layer, which replays nothing; leave replay_routing out")
    # Few bytes go to the device: fewer than eight an id.
    dtype = torch.int16 if max(layer.num_experts for layer in layers) <= 1 << 15 else torch.int32
    ids_LTK = torch.full((len(layers), num_tokens, top_k), -1, dtype=dtype, device=device)
    for place, (layer, layer_ids_TK) in enumerate(zip(layers, flat, strict=True)):
        if layer_ids_TK is not None:
            ids_LTK[place, :, : layer.top_k] = layer_ids_TK
    return ids_LTK, gaps or any(layer_ids_TK is None for layer_ids_TK in flat)


def _flat(where: str, layer: Row, ids: Tensor) -> Tensor:
    """(T, K) ids of one layer."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (2, 3):
        raise ValueError(
            f"{where}: {layer.name} has {ids.dtype} of shape {tuple(ids.shape)}, expected integers of shape (T, K) "
            "or (B, S, K)"
        )
    if ids.shape[-1] != layer.top_k:
        raise ValueError(
            f"{where}: {layer.name} has shape {tuple(ids.shape)}, that is K = {ids.shape[-1]}, but its router "
            f"chooses K = {layer.top_k} experts for each token; ids of another top-k cannot be replayed"
        )
    return ids.flatten(0, -2).to(torch.int64)


def _check_values(where: str, layer: Row, ids_TK: Tensor) -> bool:
    """Whether some token has no ids. Raises a ValueError for values that are no routing."""
    if ids_TK.device.type != "cpu":
        return True
    if ids_TK.numel() == 0:
        return False
    low, high = int(ids_TK.min()), int(ids_TK.max())
    if low < -1 or high >= layer.num_experts:
        raise ValueError(
            f"{where}: {layer.name} has ids from {low} to {high}, expected [0, {layer.num_experts}), or -1 for a "
            "token that is to be routed by its router"
        )
    if low < 0:
        missing_TK = ids_TK < 0
        partly = missing_TK.any(dim=1) & ~missing_TK.all(dim=1)
        if bool(partly.any()):
            token = int(partly.nonzero()[0, 0])
            raise ValueError(
                f"{where}: {layer.name} has {ids_TK[token].tolist()} for token {token}; a token has all of its "
                f"{layer.top_k} experts, or -1 in all places"
            )
    # Pairs and not a sort, which takes longer for a few columns.
    for first in range(layer.top_k):
        for second in range(first + 1, layer.top_k):
            same_T = (ids_TK[:, first] == ids_TK[:, second]) & (ids_TK[:, first] >= 0)
            if bool(same_T.any()):
                token = int(same_T.nonzero()[0, 0])
                raise ValueError(
                    f"{where}: {layer.name} has {ids_TK[token].tolist()} for token {token}; its "
                    f"{layer.top_k} experts must differ"
                )
    return low < 0


def replayed_weights(
    logits_TE: Tensor,
    ids_TK: Tensor,
    own_weights_TK: Tensor,
    missing_T1: Tensor | None,
    weighing: Weighing,
) -> Tensor:
    """Weights of replayed experts in the dtype of the router's own, and these where nothing is replayed.

    Args:
        logits_TE: (T, E) current logits. Gradient flows.
        ids_TK: (T, K) experts.
        own_weights_TK: (T, K) weights that the router gave to its own choice. Gradient flows.
        missing_T1: (T, 1) bool, True for tokens that are not replayed; None for none.
        weighing: of the router.
    """
    weights_TK = weighing(logits_TE.to(compute_dtype(logits_TE.dtype)), ids_TK).to(own_weights_TK.dtype)
    return weights_TK if missing_T1 is None else torch.where(missing_T1, own_weights_TK, weights_TK)
