"""Checks a router class against its family row by running a small stand-in of it on the CPU.

Shapes: T tokens (a few dozen random ones), D model, E experts, K top-k.

A wrong row would be silent: the loss would balance something the model does not do. So every router class
is run once at attach time and its output compared with what the row claims. The stand-in shares the
router's class and plain attributes; its parameters and buffers are fresh float32 CPU tensors of the same
(global) shapes. The real module, its device and the global random state are never touched, so meta,
sharded, quantised and bfloat16 routers are probed alike.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.integrations.families import Family, grouped_by_count
from trimtab.scores import SCORE_NAMES, ScoreName, scores

NUM_TOKENS = 32
# Columns of the probe input that are not zero: enough for generic logits, and cheap at any D.
ACTIVE_DIM = 64
LOGIT_STD = 1.5
TOLERANCE = 1e-3

_MODULE_STATE = frozenset(vars(nn.Module()))
# Instance attributes that hooks of other libraries leave behind; the class's own forward is probed.
_PATCHED = frozenset({"forward", "_forward", "_old_forward", "_hf_hook", "_compiled_call_impl"})
_SHARDED_BASES = frozenset({"FSDPModule", "ReplicateModule"})


class RouterMismatchError(ValueError):
    """A router does not do what its family row says."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of a stand-in: input (T, D), logits (T, E), ids (T, K), expert bias (E,)."""

    input: Tensor
    output: Any
    logits: Tensor
    weights: Tensor
    ids: Tensor
    expert_bias: Tensor | None
    stand_in: nn.Module


def resolve(root: Any, path: str) -> Any:
    """The attribute at a dotted ``path`` below ``root``, or None where a step is missing."""
    for step in path.split("."):
        root = getattr(root, step, None)
        if root is None:
            return None
    return root


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that the model's author wrote, below the ones sharding and parametrisation put on top."""
    cls = type(module)
    parametrized = "parametrizations" in module._modules
    while True:
        if any(base.__name__ in _SHARDED_BASES for base in cls.__bases__):
            cls = next(base for base in cls.__bases__ if base.__name__ not in _SHARDED_BASES)
        elif parametrized and cls.__name__.startswith("Parametrized"):
            cls, parametrized = cls.__bases__[0], False
        else:
            return cls


def _full_shape(tensor: Tensor) -> torch.Size:
    # DeepSpeed ZeRO-3 leaves an empty tensor and keeps the shape beside it.
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    shape = _full_shape(tensor)
    fresh = torch.zeros(shape, dtype=torch.float32, device="cpu")
    if not (tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.int8)):
        return fresh.to(tensor.dtype)
    if len(shape) >= 2:
        active = min(ACTIVE_DIM, shape[-1])
        std = LOGIT_STD / active**0.5
        values = torch.randn((*shape[:-1], active), generator=generator, dtype=torch.float32, device="cpu")
        fresh[..., :active] = values * std
    elif len(shape) == 1:
        fresh.uniform_(0.5, 1.5, generator=generator)
    else:
        fresh.fill_(1.0)
    return fresh


def _stand_in_linear(linear: Any, generator: torch.Generator) -> nn.Module:
    fresh = nn.Linear(1, 1, bias=False, device="meta")
    fresh.in_features, fresh.out_features = int(linear.in_features), int(linear.out_features)
    shape_only = torch.empty(fresh.out_features, fresh.in_features, device="meta")
    fresh.weight = nn.Parameter(_random_like(shape_only, generator), requires_grad=False)
    if getattr(linear, "bias", None) is not None:
        fresh.bias = nn.Parameter(_random_like(shape_only[:, 0], generator), requires_grad=False)
    return fresh


def stand_in(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module of the same class and plain attributes with random float32 CPU tensors and no hooks.

    Linear layers inside (also quantised and adapter-wrapped ones) become plain ones of the same size.
    """
    while isinstance(wrapped := getattr(module, "base_layer", None), nn.Module):
        module = wrapped
    cls = plain_class(module)
    fresh: nn.Module = cls.__new__(cls)
    nn.Module.__init__(fresh)
    for name, value in vars(module).items():
        if name in _MODULE_STATE or name in _PATCHED or name.startswith("_fsdp"):
            continue
        # Containers are copied so that a router that writes into one does not write into the model's.
        vars(fresh)[name] = value.copy() if type(value) in (dict, list, set) else value
    for name, parameter in module._parameters.items():
        fresh.register_parameter(
            name,
            None
            if parameter is None
            else nn.Parameter(_random_like(parameter, generator), requires_grad=False),
        )
    for name, buffer in module._buffers.items():
        fresh.register_buffer(name, None if buffer is None else _random_like(buffer, generator))
    for name, child in module._modules.items():
        if name == "parametrizations" and child is not None:
            for parameter_name, originals in child.named_children():
                original = resolve(originals, "original")
                if isinstance(original, Tensor):
                    value = nn.Parameter(_random_like(original, generator), requires_grad=False)
                    fresh.register_parameter(parameter_name, value)
        elif child is None:
            fresh._modules[name] = None
        else:
            inner = child
            while isinstance(wrapped := getattr(inner, "base_layer", None), nn.Module):
                inner = wrapped
            is_linear = all(isinstance(getattr(inner, a, None), int) for a in ("in_features", "out_features"))
            fresh._modules[name] = (
                _stand_in_linear(inner, generator) if is_linear else stand_in(inner, generator)
            )
    fresh.training = False
    return fresh


def input_width(router: nn.Module, weight: str) -> int | None:
    """D, the width of the router's input, from its weight or its attributes; None if neither tells."""
    weight_ED = resolve(router, weight)
    if isinstance(weight_ED, Tensor) and len(_full_shape(weight_ED)) == 2:
        return int(_full_shape(weight_ED)[1])
    for name in ("hidden_dim", "hidden_size", "in_features", "wg.in_features", "gate.in_features"):
        if isinstance(width := resolve(router, name), int):
            return width
    for parameter in router.parameters():
        if len(_full_shape(parameter)) == 2:
            return int(_full_shape(parameter)[1])
    return None


def run(
    router: nn.Module,
    block: nn.Module,
    family: Family,
    num_experts: int | None,
    top_k: int | None,
    changes: Mapping[str, Any] | None = None,
    shift: float = 0.0,
) -> Probe:
    """Run a stand-in of ``router`` on random tokens, with ``changes`` made to it.

    Args:
        router: the real router; only its class, attributes and shapes are read.
        block: its parent, read for a selection bias that it holds.
        family: the row to probe under.
        num_experts: E, or None to take it from the logits.
        top_k: K, or None to take it from the ids.
        changes: instance attributes to set on the stand-in, such as another K.
        shift: added to all logits of a gate that is a linear map.

    Returns:
        The input, the output and what `Family.unpack` makes of it.

    Raises:
        RouterMismatchError: no input width, the call fails, or the output has other shapes.
    """
    name = type(router).__name__
    generator = torch.Generator(device="cpu").manual_seed(0)
    width = input_width(router, family.weight)
    if width is None:
        raise RouterMismatchError(
            f"{name}: no (E, D) gate weight at {family.weight!r} and no hidden_dim attribute; name the "
            f"weight's path in Family(weight=...)"
        )
    # The router's forward may create tensors or draw numbers: on the CPU, in float32, and without a trace in
    # the global random state.
    with (
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        fresh = stand_in(router, generator)
        for attribute, value in (changes or {}).items():
            setattr(fresh, attribute, value)
        for path in family.probe_ones:
            if isinstance(factor := resolve(fresh, path), Tensor):
                factor.fill_(1.0)
        bias_E = _set_bias(fresh, block, family, generator)
        active = min(ACTIVE_DIM, width)
        input_TD = torch.zeros(NUM_TOKENS, width, dtype=torch.float32)
        input_TD[:, :active] = torch.randn(NUM_TOKENS, active, generator=generator, dtype=torch.float32)
        weight_ED = resolve(fresh, family.weight)
        if shift and isinstance(weight_ED, Tensor):
            input_TD[:, 0], weight_ED[:, 0] = 1.0, shift
        given = input_TD if family.input_ndim == 2 else input_TD.unflatten(0, (2, NUM_TOKENS // 2))
        # A clone: some routers scale their input in place.
        arguments = (given.clone(), bias_E) if family.bias_is_argument else (given.clone(),)
        try:
            output = type(fresh).forward(fresh, *arguments)
            logits_TE, weights, ids_TK = family.unpack(output, 0 if top_k is None else top_k)
        except Exception as error:
            raise RouterMismatchError(
                f"{name}: the probe's call failed with {type(error).__name__}: {error}. Expected "
                f"forward({'hidden_states, expert_bias' if family.bias_is_argument else 'hidden_states'}) on "
                f"{family.input_ndim}-D input returning what Family.unpack reads"
            ) from error
    _check_shapes(name, logits_TE, weights, ids_TK, num_experts, top_k)
    return Probe(input_TD, output, logits_TE, weights, ids_TK, bias_E, fresh)


def _set_bias(
    fresh: nn.Module, block: nn.Module, family: Family, generator: torch.Generator
) -> Tensor | None:
    if family.expert_bias is None:
        return None
    holder, path = family.expert_bias.split(".", 1)
    bias = resolve(fresh if holder == "router" else block, path)
    if not isinstance(bias, Tensor):
        return None
    # Of the size of the gaps between scores, so that selection by scores alone would give other ids.
    values_E = torch.randn(_full_shape(bias).numel(), generator=generator, dtype=torch.float32) * 0.2
    if holder == "router":
        bias.copy_(values_E.view(bias.shape))
    return values_E


def _check_shapes(
    name: str, logits_TE: Any, weights: Any, ids_TK: Any, num_experts: int | None, top_k: int | None
) -> None:
    def shape(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    given = f"logits {shape(logits_TE)}, weights {shape(weights)}, ids {shape(ids_TK)}"
    E, K = num_experts or "E", top_k or "K"
    expected = (
        f"expected logits ({NUM_TOKENS}, {E}), weights ({NUM_TOKENS}, {K}), integer ids ({NUM_TOKENS}, {K})"
    )
    tensors = all(isinstance(value, Tensor) and value.dim() == 2 for value in (logits_TE, weights, ids_TK))
    if (
        not tensors
        or ids_TK.is_floating_point()
        or len({v.shape[0] for v in (logits_TE, weights, ids_TK)}) != 1
    ):
        raise RouterMismatchError(f"{name}: the output gives {given}; {expected}")
    if (num_experts and logits_TE.shape[1] != num_experts) or (top_k and ids_TK.shape[1] != top_k):
        raise RouterMismatchError(f"{name}: the output gives {given}; {expected}")
    if weights.shape not in (ids_TK.shape, logits_TE.shape) or logits_TE.shape[0] != NUM_TOKENS:
        raise RouterMismatchError(f"{name}: the output gives {given}; {expected}")
    if not 0 <= int(ids_TK.min()) <= int(ids_TK.max()) < logits_TE.shape[1]:
        raise RouterMismatchError(f"{name}: the ids run outside [0, {logits_TE.shape[1]}); {given}")


def weights_tell_score(probe: Probe) -> bool:
    """Whether the weights depend on the scores at all: at K = 1 a renormalised weight is always 1."""
    return bool((probe.weights.amax(0) - probe.weights.amin(0)).max() > TOLERANCE)


def fitting_scores(probe: Probe) -> tuple[ScoreName, ...]:
    """The score functions whose values at the chosen experts are proportional to the weights.

    The factor may differ from token to token (renormalisation) and is arbitrary (scaling); at K = 1 it must
    be the same for all tokens.
    """
    # At K = E a (T, E) tensor may be either layout.
    chosen = [probe.weights] if probe.weights.shape == probe.ids.shape else []
    if probe.weights.shape == probe.logits.shape:
        chosen.append(probe.weights.gather(1, probe.ids))
    fits: list[ScoreName] = []
    for name in SCORE_NAMES:
        for chosen_TK in chosen:
            ratio_TK = chosen_TK.float() / scores(probe.logits, name).gather(1, probe.ids)
            dim = 0 if ratio_TK.shape[1] == 1 else 1
            spread = ratio_TK.amax(dim) - ratio_TK.amin(dim)
            if name not in fits and bool((spread <= TOLERANCE * ratio_TK.abs().amax(dim)).all()):
                fits.append(name)
    return tuple(fits)


def selection_is_topk(probe: Probe, score: ScoreName, bias_on_logits: bool) -> bool:
    """Whether the ids are K distinct experts with the largest score plus bias, up to ties."""
    choice_TE = probe.logits.float() if bias_on_logits else scores(probe.logits, score)
    if probe.expert_bias is not None:
        choice_TE = choice_TE + probe.expert_bias
    ids_TK = probe.ids.sort(dim=1).values
    if bool((ids_TK[:, 1:] == ids_TK[:, :-1]).any()):
        return False
    chosen_TK = choice_TE.gather(1, ids_TK).sort(dim=1).values
    best_TK = choice_TE.topk(ids_TK.shape[1], dim=1).values.sort(dim=1).values
    return torch.allclose(chosen_TK, best_TK, rtol=1e-4, atol=1e-6)


def verify_router(
    router: nn.Module, block: nn.Module, family: Family, name: str, num_experts: int, top_k: int
) -> None:
    """Compare what ``router`` does on random input with what ``family`` says.

    Raises:
        RouterMismatchError: shapes, scores, selection, groups, logits or repacking differ; the message
            says what was expected and what fits.
    """
    where = f"{type(router).__name__} at {name!r}"
    row = f"Family(router_class={family.router_class!r}, ...)"
    grouped = family.grouped(router)
    probe = run(router, block, family, num_experts, top_k)
    # With every group allowed the selection must be the plain top-k.
    plain = probe
    if grouped and hasattr(router, "topk_group") and hasattr(router, "num_group"):
        plain = run(router, block, family, num_experts, top_k, {"topk_group": router.num_group})
    score = family.score_of(router)

    if family.weights_follow_score:
        telling: Probe | None = probe
        # K = 1 and renormalised: every weight is 1 whatever the score. Another K on the stand-in tells.
        if top_k == 1 and not weights_tell_score(probe):
            can_change = family.top_k == "top_k" and num_experts > 1
            telling = run(router, block, family, num_experts, 2, {"top_k": 2}) if can_change else None
        fits = (score,) if telling is None else fitting_scores(telling)
        if score not in fits:
            found = " or ".join(map(repr, fits)) if fits else "none of " + ", ".join(map(repr, SCORE_NAMES))
            remedy = (
                f"set score={fits[0]!r}" if fits else "set weights_follow_score=False if that is intended"
            )
            raise RouterMismatchError(
                f"{where}: {row} declares score={score!r}, but the router's weights follow {found}; {remedy} "
                f"in the Family passed as attach(..., families={{{type(router).__name__!r}: Family(...)}})"
            )
    if not (grouped and plain is probe) and not selection_is_topk(plain, score, family.bias_on_logits):
        raise RouterMismatchError(
            f"{where}: the selected experts are not the top {top_k} of {score} scores"
            f"{' plus the bias at ' + repr(family.expert_bias) if plain.expert_bias is not None else ''}; "
            f"check expert_bias={family.expert_bias!r}, bias_on_logits={family.bias_on_logits} and grouped "
            f"of {row}"
        )
    if grouped and plain is not probe:
        size = num_experts // int(cast(int, router.num_group))
        groups_TK = (probe.ids // size).sort(dim=1).values
        used_T = 1 + (groups_TK[:, 1:] != groups_TK[:, :-1]).sum(1)
        if int(used_T.max()) > int(cast(int, router.topk_group)):
            raise RouterMismatchError(
                f"{where}: {row} says at most topk_group={router.topk_group} of {router.num_group} groups "
                f"are used, but a token used {int(used_T.max())}; check grouped"
            )
    if family.linear_logits:
        weight_ED, bias_E = resolve(probe.stand_in, family.weight), None
        if family.bias is not None:
            bias_E = resolve(probe.stand_in, family.bias)
        if not isinstance(weight_ED, Tensor) or weight_ED.shape[0] != num_experts:
            given = tuple(weight_ED.shape) if isinstance(weight_ED, Tensor) else weight_ED
            raise RouterMismatchError(
                f"{where}: {row} has weight={family.weight!r}, which gives {given}; expected an "
                f"({num_experts}, D) tensor; correct the path or set linear_logits=False"
            )
        linear_TE = F.linear(probe.input, weight_ED, bias_E)
        if not torch.allclose(linear_TE, probe.logits.float(), rtol=1e-3, atol=1e-3):
            raise RouterMismatchError(
                f"{where}: the logits are not F.linear(x, {family.weight}, {family.bias}), off by up to "
                f"{float((linear_TE - probe.logits).abs().max()):.3g}; set linear_logits=False in {row}"
            )
    marked = probe.weights + 1.0
    again = family.unpack(family.repack(probe.output, marked), top_k)
    if again[1] is not marked or again[0].shape != probe.logits.shape:
        raise RouterMismatchError(
            f"{where}: unpack(repack(output, weights)) of {row} does not return the weights"
        )


def infer_family(router: nn.Module, block: nn.Module, logits_index: int = 0) -> tuple[Family, int, int]:
    """A row for a class the table lacks, if it behaves like (logits_TE, weights_TK, ids_TK).

    Args:
        router: a module that the model's own recorder names as the source of its router logits.
        block: its parent.
        logits_index: where the recorder finds the logits in the output; only 0 is the common layout.

    Returns:
        A Family with the one score function that fits and the bias it was found with, E, and K.

    Raises:
        RouterMismatchError: another layout, or none or several score functions fit.
    """
    name = type(router).__name__
    if logits_index != 0:
        raise RouterMismatchError(
            f"{name}: its logits are output {logits_index}; expected (logits, weights, ids, ...)"
        )
    bias: str | None = None
    names = ("e_score_correction_bias", "expert_bias", "correction_bias")
    required = [
        p
        for p in inspect.signature(plain_class(router).forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for holder, module in (("block", block), ("router", router)):
        for attribute in names:
            wanted = holder == "router" or len(required) > 2
            if wanted and isinstance(getattr(module, attribute, None), Tensor):
                bias = f"{holder}.{attribute}"
    paths = ("weight", "gate.weight", "wg.weight", "classifier.weight", "proj.weight", "linear.weight")
    weight = next((path for path in paths if isinstance(resolve(router, path), Tensor)), "weight")
    draft = Family(
        router_class=plain_class(router).__name__,
        model_types=(),
        score="softmax",
        source="found through the model's output recorders, confirmed by the probe",
        weight=weight,
        expert_bias=bias,
        grouped=grouped_by_count,
        linear_logits=False,
    )
    try:
        probe = run(router, block, draft, None, None)
    except RouterMismatchError:
        draft = dataclasses.replace(draft, input_ndim=3)
        probe = run(router, block, draft, None, None)
    fits = fitting_scores(probe)
    if probe.ids.shape[1] == 1 and not weights_tell_score(probe) and hasattr(router, "top_k"):
        fits = fitting_scores(run(router, block, draft, None, 2, {"top_k": 2}))
    if len(fits) != 1:
        found = "several fit: " + ", ".join(fits) if fits else "none fits"
        raise RouterMismatchError(
            f"{name}: its weights must follow one of {', '.join(SCORE_NAMES)} at the chosen experts; {found}"
        )
    weight_ED = resolve(probe.stand_in, weight)
    linear = isinstance(weight_ED, Tensor) and weight_ED.shape[0] == probe.logits.shape[1]
    if linear:
        plain_TE = F.linear(probe.input, weight_ED)
        linear = torch.allclose(plain_TE, probe.logits.float(), rtol=1e-3, atol=1e-3)
    family = dataclasses.replace(draft, score=fits[0], linear_logits=linear)
    return family, probe.logits.shape[1], probe.ids.shape[1]
