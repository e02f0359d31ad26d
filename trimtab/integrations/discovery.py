"""Finds the routers of a model, and what the attach engine must know about the model around them.

Shapes: E experts, K top-k.

Routers are recognised by class name (`trimtab.integrations.families`), as trimtab's own, or, for classes
the table lacks, through the output recorders with which a transformers model says where its router logits
come from. Adapter, compile, checkpoint and data-parallel wrappers are looked through.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.families import FAMILIES, UNSERVABLE, Family, trimtab_family
from trimtab.integrations.probe import RouterMismatchError, infer_family, resolve, verify_router
from trimtab.scores import ScoreName

# Names under which wrappers hold what they wrap: PEFT, torch.compile, checkpoint_wrapper, FSDP1, DDP.
_WRAPPED = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_SUSPICIOUS = re.compile(r"Router|TopK|MoE.*Gat(e|ing)$|Mo[eE]Gate|Gate$")
# Gates that are parts of attention or of a residual, not of expert routing.
_HARMLESS = re.compile(r"ForgetGate|ResidualGate|DFineGate|Deimv2Gate|DensityRouter")

Extra = Mapping[str, "Family | None"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FoundRouter:
    """One router that trimtab can serve.

    Args:
        name: path in the model that was searched, valid for ``model.get_submodule``.
        canonical_name: ``name`` without wrapper segments: the same with and without PEFT, compile or DDP.
        module: the router, innermost: hooks on it run whatever is wrapped around it.
        block: the module that calls it.
        family: its table row.
        num_experts: E, the number of logits.
        top_k: K.
        score: the score function of this instance.
    """

    name: str
    canonical_name: str
    module: nn.Module
    block: nn.Module
    family: Family
    num_experts: int
    top_k: int
    score: ScoreName

    @property
    def kind(self) -> Hashable:
        """Equal for routers that do the same but for their values: class, sizes and plain attributes."""
        settings = tuple(
            (name, value)
            for name, value in sorted(vars(self.module).items())
            if isinstance(value, bool | int | float | str) and name != "layer_idx"
        )
        sizes = (self.num_experts, self.top_k, None if self.weight is None else tuple(self.weight.shape))
        return (type(self.module), self.family, self.score, self.grouped, sizes, settings)

    @property
    def parent(self) -> nn.Module:
        """The block that calls the router."""
        return self.block

    @property
    def expert_bias(self) -> Tensor | None:
        """(E,) view of the live selection bias, None if there is none; `add_to_expert_bias` updates it.

        Looked up at each access: moving or sharding a model may replace the tensor. A sharded bias comes as
        the DTensor it is, in its stored shape (Ernie: (1, E)).
        """
        if self.family.expert_bias is None:
            return None
        holder, path = self.family.expert_bias.split(".", 1)
        bias = resolve(self.module if holder == "router" else self.block, path)
        if not isinstance(bias, Tensor):
            return None
        return bias if bias.dim() == 1 or _is_dtensor(bias) else bias.view(-1)

    @torch.no_grad()
    def add_to_expert_bias(self, delta_E: Tensor) -> None:
        """Add ``delta_E`` to the live selection bias in place, whatever its shape, dtype and sharding.

        Args:
            delta_E: (E,) the same values on every rank that holds a part of the bias. No gradient.

        Raises:
            ValueError: the router has no selection bias, or ``delta_E`` is not (E,).
        """
        bias = self.expert_bias
        if bias is None:
            raise ValueError(
                f"{type(self.module).__name__} at {self.name!r} has no selection bias to update; "
                f"use a balance loss for this family"
            )
        if delta_E.shape != (self.num_experts,):
            raise ValueError(f"delta_E has shape {tuple(delta_E.shape)}, expected ({self.num_experts},)")
        delta = delta_E.to(bias.device, bias.dtype).view(bias.shape)
        if _is_dtensor(bias):
            from torch.distributed.tensor import DTensor, Replicate

            assert isinstance(bias, DTensor)
            # Every rank has the values, so sharding them is a slice and needs no communication.
            whole = [Replicate()] * bias.device_mesh.ndim
            replicated = DTensor.from_local(delta, bias.device_mesh, whole, run_check=False)
            delta = replicated.redistribute(placements=bias.placements)
        bias.add_(delta)

    @property
    def grouped(self) -> bool:
        """Whether selection is limited to expert groups, so that it is not the plain top-k."""
        return self.family.grouped(self.module)

    @property
    def keeps_input(self) -> bool:
        """Whether the router's input is saved for backward anyway, in a bfloat16 model."""
        return self.family.keeps_input(self.module, self.block)

    @property
    def weight(self) -> Tensor | None:
        """The gate's own (E, D) weight; without adapters that are added to it."""
        weight = resolve(self.module, self.family.weight)
        return weight if isinstance(weight, Tensor) else None

    @property
    def bias(self) -> Tensor | None:
        """The gate's own (E,) bias, a part of the logits; not the selection bias."""
        bias = resolve(self.module, self.family.bias) if self.family.bias is not None else None
        return bias if isinstance(bias, Tensor) else None

    @property
    def linear_logits(self) -> bool:
        """Whether F.linear(x, weight, bias) gives the logits again: not under adapters."""
        if not self.family.linear_logits or "base_layer" in self.name.split("."):
            return False
        parts = [self.module, resolve(self.module, self.family.weight.rpartition(".")[0] or "weight")]
        plain = self.weight is not None and self.weight.is_floating_point()
        return plain and not any(
            hasattr(part, "base_layer") or "parametrizations" in getattr(part, "_modules", {})
            for part in parts
        )


def discover(model: nn.Module, *, extra: Extra | None = None) -> list[FoundRouter]:
    """The routers of ``model`` in module order.

    Args:
        model: any module; wrappers (PEFT, compile, DDP, FSDP, checkpointing) may be around it or inside.
        extra: rows by router class name that take precedence over the table; None leaves routers of that
            class alone.

    Returns:
        One entry per router that runs. Of a router with PEFT copies, the active one.

    Raises:
        ValueError: the model has no routers, or has one that cannot be served; the message says which and
            what to pass.
    """
    table: dict[str, Family | None] = {**FAMILIES, **(extra or {})}
    recorded = _recorded_classes(model)
    found: list[FoundRouter] = []
    skipped = False
    unknown: list[tuple[str, nn.Module, int]] = []
    unserved: list[tuple[str, nn.Module, str]] = []
    inferred: dict[type, tuple[Family, int, int]] = {}
    for name, module in _running_modules(model):
        key = _table_key(module, table)
        if key is not None:
            family = table[key]
            if family is None:
                skipped = True
            else:
                found.append(_found(model, name, module, family))
        elif _is_trimtab_router(module):
            found.append(_found(model, name, module, trimtab_family(module)))
        elif (reason := _unservable(module)) is not None:
            unserved.append((name, module, reason))
        elif (index := _recorded_index(name, module, recorded)) is not None:
            unknown.append((name, module, index))

    names = [router.name for router in found]
    for name, module, index in unknown:
        # A recorder may point at the block around a router that is served already.
        if any(other.startswith(f"{name}.") for other in names):
            continue
        block = _block(model, name)
        try:
            if type(module) not in inferred:
                inferred[type(module)] = infer_family(module, block, index)
            found.append(_found(model, name, module, *inferred[type(module)]))
        except RouterMismatchError as error:
            unserved.append((name, module, str(error)))
    if unserved:
        raise ValueError(_cannot_serve(unserved))
    if not found and not skipped:
        raise ValueError(_no_routers(model))
    order = {id(module): position for position, (_, module) in enumerate(model.named_modules())}
    return sorted(found, key=lambda router: order[id(router.module)])


def verify(found: FoundRouter | Sequence[FoundRouter]) -> None:
    """Check routers against their family rows on random input, one probe per kind of router.

    The real modules, their device and the global random state are not touched. A few milliseconds for each
    kind; routers of one class with the same sizes and plain attributes are one kind.

    Raises:
        ValueError: (`RouterMismatchError`) a router differs from its row; the message says what fits.
    """
    seen: set[Any] = set()
    for router in [found] if isinstance(found, FoundRouter) else found:
        if router.kind in seen:
            continue
        seen.add(router.kind)
        verify_router(
            router.module, router.block, router.family, router.name, router.num_experts, router.top_k
        )


def context_module(model: nn.Module, routers: Sequence[FoundRouter]) -> nn.Module:
    """The innermost module that contains every router and is called with ``input_ids`` or ``inputs_embeds``.

    Its forward sees the batch's shape, attention mask and position ids: ``Qwen3MoeModel`` in a
    ``Qwen3MoeForCausalLM``, the text model of a vision-language model. The model itself if none fits.
    """
    paths = [router.name.split(".") for router in routers]
    shared: list[str] = []
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    for length in range(len(shared), -1, -1):
        module = model.get_submodule(".".join(shared[:length]))
        # A block that reads input_ids beside its hidden_states (hash routing) is not the model.
        parameters = _parameters_of(module)
        if not parameters.isdisjoint({"input_ids", "inputs_embeds"}) and "hidden_states" not in parameters:
            return module
    return model


def stock_aux_loss_active(model: nn.Module) -> str | None:
    """One sentence if the model would add its own load-balancing loss to the training loss, else None.

    transformers adds it where the configuration (or a nested one) has ``output_router_logits=True`` and a
    non-zero coefficient, and the model's file computes it.
    """
    for module, path, config, coef in _stock_losses(model):
        if getattr(config, "output_router_logits", False) is True:
            return (
                f"{type(module).__name__} also adds its own load-balancing loss: "
                f"{path}.output_router_logits=True with {coef}; set "
                f"{path}.output_router_logits = False to train with trimtab's alone"
            )
    return None


def stock_aux_loss_at_call(model: nn.Module) -> str | None:
    """One sentence if ``output_router_logits=True`` in a call would add the model's own loss, else None."""
    for module, _, _, coef in _stock_losses(model):
        return (
            f"output_router_logits=True: given labels, {type(module).__name__} adds its own load-balancing loss "
            f"({coef}) beside the attached ones; set {coef.partition('=')[0]} to 0, or leave the argument out"
        )
    return None


def _stock_losses(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, str]]:
    """Modules that can add a stock balance loss: (module, path of its config, config, "name=coefficient")."""
    for module in model.modules():
        source = sys.modules.get(type(module).__module__)
        config = getattr(module, "config", None)
        if config is None or not hasattr(source, "load_balancing_loss_func"):
            continue
        if "labels" not in _parameters_of(module):
            continue
        for path, nested in _configs(config):
            for name in ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha"):
                # Models copy the coefficient at construction and use the copy.
                coef = getattr(module, name, getattr(nested, name, None))
                if isinstance(coef, int | float) and coef != 0:
                    yield module, path, nested, f"{name}={coef:g}"


def _found(
    model: nn.Module,
    name: str,
    module: nn.Module,
    family: Family,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> FoundRouter:
    sizes = {
        "num_experts": resolve(module, family.num_experts) if num_experts is None else num_experts,
        "top_k": resolve(module, family.top_k) if top_k is None else top_k,
    }
    for size, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{type(module).__name__} at {name!r}: Family.{size}={getattr(family, size)!r} gives "
                f"{value!r}; expected the attribute path of a positive integer"
            )
    return FoundRouter(
        name=name,
        canonical_name=_canonical(name),
        module=module,
        block=_block(model, name),
        family=family,
        num_experts=int(sizes["num_experts"]),
        top_k=int(sizes["top_k"]),
        score=family.score_of(module),
    )


def _running_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the modules that run: PEFT's saved originals and inactive copies are left out."""
    idle: set[str] = set()
    for name, module in model.named_modules():
        parent, _, _ = name.rpartition(".")
        if name in idle or parent in idle:
            idle.add(name)
            continue
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and hasattr(module, "original_module"):
            prefix = f"{name}." if name else ""
            active = list(getattr(module, "active_adapters", None) or [])
            enabled = not getattr(module, "disable_adapters", False) and active and active[0] in copies
            idle.update(f"{prefix}modules_to_save.{other}" for other in copies if other not in active[:1])
            idle.add(f"{prefix}original_module" if enabled else f"{prefix}modules_to_save")
        yield name, module


def _canonical(name: str) -> str:
    segments = name.split(".")
    # DDP holds the model as "module"; PEFT as "base_model.model" above the model's own "model".
    while segments and segments[0] in ("module", "_orig_mod"):
        segments = segments[1:]
    if segments[:2] == ["base_model", "model"]:
        segments = segments[2:]
    kept: list[str] = []
    copy_of = False
    for segment in segments:
        if copy_of:
            copy_of = False
        elif segment == "modules_to_save":
            copy_of = True
        elif segment not in (*_WRAPPED, "original_module"):
            kept.append(segment)
    return ".".join(kept)


def _block(model: nn.Module, name: str) -> nn.Module:
    """The module that calls the one at ``name``: its parent, above any wrapper around it."""
    segments = name.split(".")
    while segments:
        last = segments.pop()
        if segments and segments[-1] == "modules_to_save":
            segments.pop()
        elif last not in (*_WRAPPED, "original_module"):
            break
    return model.get_submodule(".".join(segments))


def _table_key(module: nn.Module, table: Mapping[str, Family | None]) -> str | None:
    # Subclasses count: fully_shard and parametrisations put a class of their own on top.
    return next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in table), None)


def _is_dtensor(tensor: Tensor) -> bool:
    # torch.distributed.tensor takes most of a second to import; whoever made a DTensor has paid for it.
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(tensor, dtensor.DTensor)


def _is_trimtab_router(module: nn.Module) -> bool:
    return any(
        cls.__name__ == "Router" and cls.__module__.partition(".")[0] == "trimtab"
        for cls in type(module).__mro__
    )


def _unservable(module: nn.Module) -> str | None:
    return next((UNSERVABLE[c.__name__] for c in type(module).__mro__ if c.__name__ in UNSERVABLE), None)


def _recorded_classes(model: nn.Module) -> list[tuple[type, int, str | None]]:
    """(class, output index, name filter) of every recorder of router logits in the model."""
    entries: list[tuple[type, int, str | None]] = []
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None)
        if not isinstance(recorders, Mapping):
            continue
        listed = recorders.get("router_logits")
        for recorder in listed if isinstance(listed, list | tuple) else [listed]:
            target = recorder if isinstance(recorder, type) else getattr(recorder, "target_class", None)
            if isinstance(target, type):
                entry = (target, getattr(recorder, "index", 0), getattr(recorder, "layer_name", None))
                if entry not in entries:
                    entries.append(entry)
    return entries


def _recorded_index(
    name: str, module: nn.Module, recorded: Sequence[tuple[type, int, str | None]]
) -> int | None:
    for target, index, layer_name in recorded:
        if isinstance(module, target) and (layer_name is None or layer_name in _canonical(name)):
            return index
    return None


def _parameters_of(module: nn.Module) -> set[str]:
    try:
        return set(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return set()


def _configs(config: Any, path: str = "model.config", depth: int = 0) -> Iterator[tuple[str, Any]]:
    yield path, config
    if depth < 3:
        for name in ("text_config", "thinker_config", "talker_config", "language_config", "ffn_config"):
            nested = getattr(config, name, None)
            if nested is not None and not isinstance(nested, dict):
                yield from _configs(nested, f"{path}.{name}", depth + 1)


def _cannot_serve(unserved: Sequence[tuple[str, nn.Module, str]]) -> str:
    name, module, reason = unserved[0]
    cls = type(module).__name__
    others = sorted({type(m).__name__ for _, m, _ in unserved} - {cls})
    more = f" (and {', '.join(others)})" if others else ""
    return (
        f"cannot serve router {cls} at {name!r}{more}: {reason}. Expected a module returning (logits_TE, "
        f"weights_TK, ids_TK). Pass a row attach(..., families={{{cls!r}: Family(...)}}) with its own unpack "
        f"and repack, or families={{{cls!r}: None}} to leave these routers alone"
    )


def _no_routers(model: nn.Module) -> str:
    suspects = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if _SUSPICIOUS.search(type(module).__name__) and not _HARMLESS.search(type(module).__name__)
    ]
    looked = (
        f"looked for the {len(FAMILIES)} router classes of trimtab.integrations.families.FAMILIES, trimtab's "
        f"own Router, and the classes in _can_record_outputs['router_logits']"
    )
    cls = type(model).__name__
    if not suspects:
        return f"{cls} has no Mixture-of-Experts routers: {looked}, and found none. Is this a dense model?"
    name, suspect = suspects[0]
    return (
        f"{cls} has no router that trimtab knows: {looked}. {suspect} at {name!r} looks like one; if it is, "
        f"pass attach(..., families={{{suspect!r}: Family(...)}})"
    )
