"""A dry run as text of at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimtab.train.footprint import KINDS, RouterState

if TYPE_CHECKING:
    from trimtab.train.dry_run import DryRun, Stage
    from trimtab.train.traffic import Collective


_ORDERS = {
    "alternating": "forwards and backwards alternate",
    "forward_first": "all forwards first",
    "counting_pass": "a pass that counts first, then forwards and backwards in turn",
}


def render(found: DryRun, *, name: str = "") -> str:
    """The whole report.

    Args:
        found: what `dry_run` returned.
        name: what the run is called, as ``module/config``.
    """
    sections = [
        _run(found, name),
        _stages(found),
        _parameters(found),
        _memory(found),
        _routers(found),
        _traffic(found),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _run(found: DryRun, name: str) -> list[str]:
    run, d = found.run, found.run.degrees
    degrees = {"pp": d.pp, "dp_replicate": d.dp_replicate, "dp_shard": d.dp_shard, "cp": d.cp, "tp": d.tp}
    experts = {"ep": d.ep, "etp": d.etp, "efsdp": d.efsdp}
    rows, tokens = run.global_batch_size, run.global_batch_size * found.seq_len
    place = ", ".join(f"{axis} {index}" for axis, index in found.place.items())
    forward = "float32" if found.precision == "none" else f"{found.precision} autocast"
    lines = [
        f"{name + ' on ' if name else ''}{found.world_size:,} ranks",
        f"  mesh             {_axes(degrees)}",
        f"  experts' mesh    {_axes(experts)}",
        f"  optimiser step   {rows:,} rows of {found.seq_len:,} = {tokens:,} tokens",
        f"  each data rank   {run.num_microbatches} microbatches of {run.microbatch_size} x {found.seq_len:,} "
        "tokens",
        f"  forward          {forward}, activation checkpointing: {found.checkpointing}",
        f"  order            {_ORDERS[run.order]}",
    ]
    if run.pipeline is not None:
        lines.append(f"  schedule         {run.pipeline.name}, {run.pipeline.num_stages} stages")
    return [*lines, f"  rank {found.rank:<11} {place or 'the only one'}"]


def _axes(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _stages(found: DryRun) -> list[str]:
    if found.run.pipeline is None:
        return []
    own = found.place["pp"]
    rows = [["pp rank", "stages", "layers", ""]]
    for rank in range(found.run.degrees.pp):
        stages = [stage for stage in found.stages if stage.rank == rank]
        rows.append(
            [
                str(rank),
                ", ".join(str(stage.index) for stage in stages),
                ", ".join(_layers(stage) for stage in stages),
                "this rank" if rank == own else "",
            ]
        )
    return ["Stages", *_columns(rows, left=(1, 2, 3))]


def _layers(stage: Stage) -> str:
    return _span(stage.layers) + (f" and {stage.num_mtp} mtp" if stage.num_mtp else "")


def _span(layers: range) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _parameters(found: DryRun) -> list[str]:
    p = found.parameters
    rows = [["", "model", "share", "this rank", "bytes"]]
    for kind in KINDS:
        if p.whole[kind]:
            share = f"{p.whole[kind] / p.num_whole:.2%}"
            rows.append(
                [kind, f"{p.whole[kind]:,}", share, f"{p.own[kind]:,}", size_of(p.own[kind] * p.size)]
            )
    rows.append(["all", f"{p.num_whole:,}", "", f"{p.num_own:,}", size_of(p.num_own * p.size)])
    rows.append(["one token's", f"{p.activated:,}", f"{p.activated / p.num_whole:.2%}", "", ""])
    return [f"Parameters (vocabulary of {found.num_embeddings:,})", *_columns(rows, left=(0,))]


def _memory(found: DryRun) -> list[str]:
    p = found.parameters
    own, trained = p.num_own * p.size, p.num_trained * p.size
    rows = [
        ["weights", size_of(own), f"and {size_of(p.padding)} of padding" if p.padding else ""],
        ["gradients", size_of(trained), f"of {p.num_trained:,} that are trained" if trained < own else ""],
        ["AdamW's moments", size_of(2 * trained), ""],
        ["all of these", size_of(own + 3 * trained + p.padding), ""],
    ]
    if p.gathered:
        what = "root" if found.run.pipeline is None else "all stages of this rank"
        rows.append(["gathered weights", size_of(p.gathered), f"during a step: {what}"])
    if p.accumulated:
        rows.append(
            ["gathered gradients", size_of(p.accumulated), "between microbatches, before they are summed"]
        )
    return ["Memory of this rank's parameters", *_columns(rows, left=(0, 2))]


def _routers(found: DryRun) -> list[str]:
    if not found.routers:
        return ["Balancing: this rank has no router"]
    rows = [["stage", "layers", "in flight", "counts", "handles", "step", "masks", "logits if kept"]]
    rows += [
        [
            str(one.stage),
            str(len(one.layers)),
            str(one.in_flight),
            *map(size_of, (one.counts, one.handles, one.step, one.masks, one.logits)),
        ]
        for one in found.routers
    ]
    return [
        "Memory of balancing: counts, handles and logits of each layer and microbatch, step of each layer,",
        "masks of each microbatch",
        *_columns(rows, left=()),
        f"  at most {size_of(_total(found.routers, keeps_logits=False))} as the trainer attaches (keep='input'), "
        f"{size_of(_total(found.routers, keeps_logits=True))} with keep='logits'",
    ]


def _total(states: Sequence[RouterState], *, keeps_logits: bool) -> int:
    return sum(state.total(keeps_logits=keeps_logits) for state in states)


def _traffic(found: DryRun) -> list[str]:
    if not found.collectives:
        return ["Collectives: none, there is one rank"]
    rows = [["axis", "ranks", "operation", "what", "count", "bytes"]]
    rows += [
        [one.axis, str(_ranks(found, one)), one.operation, one.what, f"{one.count:,}", size_of(one.num_bytes)]
        for one in found.collectives
        if not one.measured
    ]
    every = [one for one in found.collectives if not one.measured]
    rows.append(
        ["all", "", "", "", f"{sum(o.count for o in every):,}", size_of(sum(o.num_bytes for o in every))]
    )
    lines = [
        "Collectives of this rank in one optimiser step, and the bytes of their messages",
        *_columns(rows, left=(0, 2, 3)),
    ]
    measured = [one for one in found.collectives if one.measured]
    if measured:
        count, num_bytes = sum(o.count for o in measured), sum(o.num_bytes for o in measured)
        every_few = "every step" if found.log_interval == 1 else f"one of {found.log_interval} steps"
        lines.append(f"  and {count} more of {size_of(num_bytes)} in {every_few}, which measures losses")
    return lines


def _ranks(found: DryRun, one: Collective) -> int:
    d = found.run.degrees
    named = {"world": found.world_size, "tokens": d.data * d.sequence, "dp_cp": d.dp_shard * d.cp}
    size: int = named[one.axis] if one.axis in named else getattr(d, one.axis)
    return size


def size_of(num_bytes: int) -> str:
    """A number of bytes in the largest unit that leaves at least 1."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def _columns(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> list[str]:
    """Rows as aligned lines; numbers to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
