"""What the tensors of a transformers model are called in memory, and in the files that model hubs serve.

transformers knows for each family which tensors of a file make one in memory (one for each expert, say, stacked)
and how to take them apart again. Here its own rules are applied to tensors of any kind, without a model: lazy ones
keep a rank from reading what it does not hold.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.integrations.checkpoint_mtp import (
    LAYER,
    MTP,
    as_numbered,
    mtp_conversions,
    num_mtp_layers,
    under_mtp,
)


def stock_class(model: nn.Module) -> Any:
    """The class of transformers that a model is of, under whatever has been derived from it.

    Raises:
        ValueError: it is of none.
    """
    from transformers import PreTrainedModel

    for cls in type(model).__mro__:
        # Derived classes may bear the name of the one they are of.
        named = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
        if issubclass(cls, PreTrainedModel) and cls.__module__.startswith("transformers.") and named is cls:
            return cls
    raise ValueError(
        f"{type(model).__name__} is no model of transformers; only checkpoints of those are known"
    )


def stock_model(cls: Any, config: Any) -> Any:
    """A model of transformers without values, to ask for names and shapes."""
    config = copy.deepcopy(config)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        return cls(config)


@dataclass(frozen=True, slots=True)
class InMemory:
    """Tensors of files as a model has them.

    Args:
        tensors: by name in memory.
        unknown: names in the files that nothing in memory is made of.
        problems: what cannot be put together, one line each.
        broken: of which tensors these speak.
    """

    tensors: dict[str, Tensor]
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Group:
    """Tensors of files that make one or more in memory.

    Args:
        converter: how; None for one that is as it is in memory.
        sources: names in files, each with the converter's pattern that it fits.
    """

    converter: Any
    sources: list[tuple[str, str]] = field(default_factory=list)


def to_memory(
    stock: Any,
    names: Iterable[str],
    open_tensor: Callable[[str, torch.dtype], Tensor],
    wanted: Mapping[str, torch.dtype],
) -> InMemory:
    """Put together what a model has from what files have.

    Args:
        stock: from `stock_model`.
        names: all names in the files.
        open_tensor: gives the tensor of a name, in a dtype.
        wanted: dtypes of all tensors of the model, by name in memory.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    own = {name: dtype for name, dtype in wanted.items() if not name.startswith(MTP)}
    groups, unknown = _match(names, get_model_conversion_mapping(stock), own, stock.base_model_prefix)
    found = InMemory({}, unknown)
    _convert(stock, groups, open_tensor, own, found, "")
    if len(own) < len(wanted):
        mtp = {name.removeprefix(MTP): dtype for name, dtype in wanted.items() if name.startswith(MTP)}
        groups, unknown = _match(unknown, mtp_conversions(stock, num_mtp_layers(wanted)), mtp, None)
        found = replace(found, unknown=unknown)
        _convert(stock, groups, open_tensor, mtp, found, MTP)
    return found


def expected_unknown(
    stock: Any, names: Iterable[str], *, num_layers: int, num_mtp_layers: int, other: Any = None
) -> set[str]:
    """Those tensors of files that a model may leave alone.

    Args:
        stock: from `stock_model`.
        names: in files, that nothing in memory is made of.
        num_layers: decoder layers of the model. What files number beyond is of multi-token prediction.
        num_mtp_layers: such layers in the model. Further ones are left alone.
        other: the model, without values, that the files were written for, if that is not the model's own class but
            one of which it is the text part.
    """
    from transformers.modeling_layers import MtpModel

    shared = re.compile("|".join(MtpModel._keys_to_ignore_on_load_unexpected))
    allowed, rest = set(), []
    for name in names:
        match = LAYER.search(name)
        number = int(match[1]) if match else 0
        if name.startswith(MTP):
            # Beside layers, what belongs to the first of them.
            known = number if match else 0
        elif match and number >= num_layers:
            known = number - num_layers
        else:
            rest.append(name)
            continue
        if known >= num_mtp_layers or shared.search(name):
            allowed.add(name)
    report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(rest))
    stock._adjust_missing_and_unexpected_keys(report)
    allowed |= set(rest) - report.unexpected_keys
    if other is not None and report.unexpected_keys:
        allowed |= _outside_text(other, report.unexpected_keys)
    return allowed


def to_disk(stock: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take apart what a model has into what files have; the inverse of `to_memory`.

    Args:
        stock: from `stock_model`.
        tensors: by name in memory, all of them. Of those that are tied, one is written.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tied = {name for name, source in stock.all_tied_weights_keys.items() if source in tensors}
    layers = _decoder_layers(stock)
    first = stock.config.get_text_config().num_hidden_layers
    renamed = {as_numbered(name, layers, first): x for name, x in tensors.items() if name not in tied}
    written: dict[str, Tensor] = revert_weight_conversion(stock, renamed)
    patterns = stock._keys_to_ignore_on_load_unexpected or ()
    if any(re.match(pattern, MTP) for pattern in patterns):
        return {under_mtp(name, layers, first): x for name, x in written.items()}
    return written


# ------------------------------------------------------------------ reading


def _match(
    names: Iterable[str], conversions: Iterable[Any], wanted: Mapping[str, object], prefix: str | None
) -> tuple[dict[str, _Group], list[str]]:
    """Which tensors of files make which in memory, by the first of these; and those that make none."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    groups: dict[str, _Group] = {}
    unknown = []
    known = dict.fromkeys(wanted, True)  # what is looked up in it must not be None
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unknown.append(name)
            continue
        if target not in groups:
            groups[target] = _Group(None if pattern is None else copy.deepcopy(converter_of[pattern]))
        groups[target].sources.append((pattern or "", name))
    return groups, unknown


def _convert(
    stock: Any,
    groups: Mapping[str, _Group],
    open_tensor: Callable[[str, torch.dtype], Tensor],
    wanted: Mapping[str, torch.dtype],
    found: InMemory,
    prefix: str,
) -> None:
    """Put groups together, into ``found``."""
    for target, group in groups.items():
        names = [name for _, name in group.sources]
        problems = [f"it lacks {name}" for name in _gaps(group)]
        made: dict[str, Any] = {}
        if group.converter is None:
            made[target] = open_tensor(names[0], wanted[target])
            if len(names) > 1:
                problems.append(f"{prefix}{target} is in it more than once, as {' and '.join(names)}")
        elif not problems:
            for pattern, name in group.sources:
                group.converter.add_tensor(target, name, pattern, open_tensor(name, wanted[target]))
            try:
                made = group.converter.convert(target, model=stock, config=stock.config)
            except Exception as error:  # whatever a conversion finds wrong with what it is given
                problems.append(
                    f"{prefix}{target} cannot be put together from {len(names)} tensors such as {names[0]} "
                    f"({type(error).__name__}: {error})"
                )
        for name, tensor in made.items():
            found.tensors[f"{prefix}{name}"] = tensor[0] if isinstance(tensor, list) else tensor
        if problems:
            found.problems.extend(problems)
            found.broken.add(f"{prefix}{target}")


def _gaps(group: _Group) -> list[str]:
    """Names that are missing in a numbered series, such as that of the experts."""
    if group.converter is None:
        return []
    series: dict[str, list[list[str]]] = {}
    for pattern, name in group.sources:
        series.setdefault(pattern, []).append(name.split("."))
    missing = [pattern for pattern in group.converter.source_patterns if pattern not in series]
    if missing:
        return [f"all of {pattern} for {group.sources[0][1]}" for pattern in missing]
    longest = max(series.values(), key=len)
    columns = [c for c, parts in enumerate(zip(*longest, strict=False)) if len(set(parts)) > 1]
    if len(columns) != 1:
        return []  # no series
    (column,) = columns
    if not all(name[column].isdigit() for names in series.values() for name in names):
        return []
    count = 1 + max(int(name[column]) for names in series.values() for name in names)
    gaps = []
    for names in series.values():
        present = {int(name[column]) for name in names}
        before, after = names[0][:column], names[0][column + 1 :]
        gaps += [".".join([*before, str(i), *after]) for i in range(count) if i not in present]
    return gaps


def _outside_text(other: Any, names: Iterable[str]) -> set[str]:
    """Names of what a multimodal model has outside its text decoder."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    decoder = _decoder(other)
    inside = {name: True for name in other.state_dict()}
    groups, _ = _match(names, get_model_conversion_mapping(other), inside, other.base_model_prefix)
    return {
        name
        for target, group in groups.items()
        if not target.startswith(f"{decoder}.")
        for _, name in group.sources
    }


# ------------------------------------------------------------------ writing


def _decoder(stock: Any) -> str:
    decoder = stock.get_decoder()
    return next(name for name, module in stock.named_modules() if module is decoder)


def _decoder_layers(stock: Any) -> str:
    return f"{_decoder(stock)}.layers."
