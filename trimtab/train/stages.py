"""What pipeline stages know apart, put together on every rank.

Legend: L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from trimtab.parallel.mesh import Mesh

T = TypeVar("T")


def gather_stages(own: Mapping[int, T], mesh: Mesh | None) -> list[T]:
    """What every stage has, in order of stages, on every rank.

    All ranks of a pipeline call it, whatever their stages hold: a stage without MoE layers takes part with
    nothing to tell, so that nobody waits for it.

    Args:
        own: what this rank's stages have, by stage; plain enough to be pickled.
        mesh: where ranks are; None for one process.
    """
    found: dict[int, T] = dict(own)
    group = None if mesh is None else mesh.group("pp")
    if group is not None:
        everybody: list[Any] = [None] * group.size()
        dist.all_gather_object(everybody, dict(own), group=group)
        found = {stage: value for one in everybody for stage, value in one.items()}
    return [found[stage] for stage in sorted(found)]


def join_metrics(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of a whole model from those of its parts, as `trimtab.metrics.summarize` returns them.

    Args:
        parts: in order of layers, of parts that have MoE layers.

    Returns:
        The same, each list over all L layers; None where no part knows a quantity, and a None for each layer of
        a part that does not.
    """
    joined: dict[str, Any] = {}
    for name in parts[0]:
        if name == "losses":
            known = dict.fromkeys(loss for part in parts for loss in part["losses"])
            joined[name] = {
                loss: {
                    kind: [value for part in parts for value in part["losses"][loss][kind]]
                    for kind in ("value", "scaled")
                }
                for loss in known
            }
        elif all(part[name] is None for part in parts):
            joined[name] = None
        else:
            values = [part[name] or [None] * len(part["layers"]) for part in parts]
            joined[name] = [value for part in values for value in part]
    return joined
