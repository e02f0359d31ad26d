"""Several microbatches in one forward: by turns, layer by layer, or as rows of one batch.

Each stays a microbatch of its own: with its masks and documents, its counts, losses and metrics, and its place
in the step. What changes is only the order in which Python runs their layers.

Overlapping the communication of one microbatch with the computation of another takes a forward that goes to
and fro between them. A `MicrobatchRun` says whose tokens a part of that forward holds, and marks what the part
returns, because in backward the parts of all microbatches are mixed as well and checkpointed layers read masks
and groups once more.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from trimtab.hooks import mark
from trimtab.ledger import Ledger
from trimtab.microbatch import Concatenation, Context, Description, Microbatch
from trimtab.row import ForwardsUnderWay

Output = TypeVar("Output")


class MicrobatchRun:
    """One of several microbatches whose forwards run by turns; made by `Balancer.interleaved`.

    It is called with each part of its forward in turn, ``x = run(layer, x)``, and not entered in a ``with``
    block: what a part returns has to be seen.

    Args:
        context: of the model.
        ledger: of the model.
        microbatch: its tokens, with a ticket.
        number: place among the microbatches of its block, from 1.
    """

    def __init__(
        self, context: Context, ledger: Ledger, microbatch: Microbatch | Concatenation, number: int
    ) -> None:
        self.context = context
        self.ledger = ledger
        self.microbatch = microbatch
        self.number = number
        self.ended = False
        self.layers: frozenset[int] = frozenset()  # that it ran, once it has ended

    def __call__(self, part: Callable[..., Output], *args: Any, **kwargs: Any) -> Output:
        """Run a part of this microbatch's forward: ``part(*args, **kwargs)``.

        Args:
            part: a layer or any function of this microbatch's tensors alone. May be compiled, or
                `torch.utils.checkpoint.checkpoint` with the layer as its first argument.
            args: of the part.
            kwargs: of the part.

        Returns:
            What the part returns. Gradient flows.

        Raises:
            RuntimeError: the microbatch has ended, or another run is under way.
            TypeError: the part ran a router and returns no tensor.
        """
        context = self.context
        compiling = torch.compiler.is_compiling()
        # A checkpoint around this call runs it again in backward, long after its end.
        recomputing = not compiling and torch._C._current_graph_task_id() != -1
        if not compiling and not recomputing:
            self._check()
        before = context.current, context.running, context.in_run
        context.current, context.running, context.in_run = self.microbatch, True, True
        num_layers = 0 if compiling else len(self._layers())
        try:
            output = part(*args, **kwargs)
        finally:
            context.current, context.running, context.in_run = before
        if compiling or not self.microbatch.active or mark(output, context, self.microbatch):
            return output
        if len(self._layers()) > num_layers and torch.is_grad_enabled():
            raise TypeError(
                f"a part of microbatch {self.number} ran a router and returned {type(output).__name__}, in which "
                "no tensor is found: backward could not tell whose tokens it computes again; return the tensors "
                "that the part computes, alone or in tuples, lists, dictionaries or dataclasses"
            )
        return output

    def end(self) -> None:
        """Say that this microbatch is through its last layer: its counts join the step's, and their sum starts.

        The end of the block says it for those that have not. Say it before where their backward runs inside
        the block. With several ranks all of them end their microbatches in the same order.
        """
        if self.ended:
            return
        self.layers, self.ended = self._layers(), True
        for part in self.microbatch.parts:
            self.ledger.end_forward(int(part.ticket))

    def _drop(self) -> None:
        """Forget what it counted, unless it has ended."""
        self.ended = True
        for part in self.microbatch.parts:
            self.ledger.drop_forward(int(part.ticket))

    def _layers(self) -> frozenset[int]:
        """Layers that have counted it."""
        if self.ledger.under_way is None or self.ended:
            return self.layers
        return self.ledger.under_way.layers(int(self.microbatch.parts[0].ticket))

    def _check(self) -> None:
        if self.ended:
            raise RuntimeError(
                f"microbatch {self.number} of balancer.interleaved(...) has ended and cannot run another part; run "
                "all of its layers inside the block, and before run.end()"
            )
        if self.context.in_run:
            raise RuntimeError(
                f"microbatch {self.number} of balancer.interleaved(...) is run inside a part of another or of "
                "itself; a part holds the tokens of one microbatch: call one run after the other"
            )


@contextlib.contextmanager
def interleave(
    context: Context, ledger: Ledger, descriptions: Sequence[Description]
) -> Iterator[tuple[MicrobatchRun, ...]]:
    """Begin a forward of each microbatch, and end them with the block; see `Balancer.interleaved`."""
    _check_descriptions(context, descriptions, "interleaved")
    if context.interleaved:
        raise RuntimeError(
            "balancer.interleaved(...) inside another: microbatches that run by turns begin and end together; give "
            "all of them to the outer one"
        )
    if context.explicit is not None:
        raise RuntimeError(
            "balancer.interleaved(...) inside `with balancer.microbatch(...)`: give the description to "
            "interleaved([...]) instead of entering it"
        )
    active = context.counting or (torch.is_grad_enabled() and context.module.training)
    runs = []
    try:
        context.interleaved, ledger.under_way = True, ForwardsUnderWay(ledger.rows)
        for number, description in enumerate(descriptions, start=1):
            microbatch = description.microbatch.with_active(active)
            microbatch.by_turns = True
            context.number(microbatch)
            if active:
                for part in microbatch.parts:
                    ledger.under_way.begin(int(part.ticket))
            runs.append(MicrobatchRun(context, ledger, microbatch, number))
        yield tuple(runs)
        _check_layers(ledger, runs)
        for run in runs:
            run.end()
    except BaseException:
        for run in runs:
            run._drop()
        raise
    finally:
        context.interleaved, ledger.under_way = False, None


def concatenate(context: Context, descriptions: Sequence[Description]) -> Description:
    """Several microbatches as one forward; see `Balancer.concatenated`."""
    _check_descriptions(context, descriptions, "concatenated")
    return Description(
        context, Concatenation([part for one in descriptions for part in one.microbatch.parts])
    )


def _check_descriptions(context: Context, descriptions: Sequence[Description], name: str) -> None:
    if isinstance(descriptions, Description) or not all(isinstance(d, Description) for d in descriptions):
        raise ValueError(
            f"{name}({descriptions!r}) takes a list of microbatches, as in balancer.{name}("
            "[balancer.microbatch(valid_mask=mask_a), balancer.microbatch(valid_mask=mask_b)])"
        )
    if not descriptions:
        raise ValueError(f"{name}([]) has no microbatch; give one or more")
    if any(description.context is not context for description in descriptions):
        raise ValueError(
            f"a microbatch given to {name}([...]) was described by the balancer of another model; describe it "
            "with microbatch(...) of this one"
        )


def _check_layers(ledger: Ledger, runs: Sequence[MicrobatchRun]) -> None:
    """Raise if a layer ran some microbatches and not others: its counts and weights would be wrong."""
    layers = [run._layers() for run in runs]
    for run, ran in zip(runs, layers, strict=True):
        missing = sorted(frozenset().union(*layers) - ran)
        if missing:
            raise RuntimeError(
                f"microbatch {run.number} of balancer.interleaved(...) did not run {ledger.rows[missing[0]].name}"
                f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}, as others did: a layer "
                "that some microbatches leave out would be balanced on the rest, weighted too low; run every "
                "microbatch through the same layers, or give those that differ to a block of their own"
            )
