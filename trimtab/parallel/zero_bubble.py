"""What schedules that split backward need of activation checkpointing and of the compiler.

Zero-bubble schedules compute gradients of inputs first and gradients of weights later, when other microbatches
may have run in between, and pass through parts of one graph more than once. So checkpointed layers are
computed again several times, each time long after their forward, and compiled backwards must not consume
what they read.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class HasCurrent(Protocol):
    """What knows the microbatch that runs now: `trimtab.microbatch.Context`, as ``balancer.context``."""

    current: Any


def keep_microbatch(
    contexts: Sequence[HasCurrent], context_fn: Callable[[], Contexts] | None = None
) -> Callable[[], Contexts]:
    """A ``context_fn`` for `torch.utils.checkpoint.checkpoint` whose recomputation sees its own microbatch.

    Without it routers that are computed again would read masks and groups of whichever microbatch ran last,
    if backward does not start from the model's output.

    Compiled layers need nothing: masks and groups are inputs of their graph.

    Args:
        contexts: of the balancers of this part. Read when a layer runs, so a list may be filled later.
        context_fn: selective checkpointing's, as ``partial(create_selective_checkpoint_contexts, policy)``.
            What it saved can then be used more than once, as zero bubble does.
    """

    def make() -> Contexts:
        if torch.compiler.is_compiling():
            # Inside a graph a checkpoint takes policies only; the empty one computes everything again.
            return create_selective_checkpoint_contexts([]) if context_fn is None else context_fn()
        forward, recompute = (
            (contextlib.nullcontext(), contextlib.nullcontext()) if context_fn is None else context_fn()
        )
        return forward, _Recomputation(contexts, recompute)

    return make


class _Recomputation:
    """Context of one layer's recomputations, which may be entered any number of times in turn."""

    def __init__(self, contexts: Sequence[HasCurrent], inner: AbstractContextManager[Any]) -> None:
        self.contexts = tuple(contexts)
        self.microbatches = [context.current for context in self.contexts]
        self.inner = inner

    def __enter__(self) -> None:
        self.before = [context.current for context in self.contexts]
        # Selective checkpointing takes each saved result out of its store as it is used.
        self.store: dict[Any, Any] = getattr(self.inner, "storage", {})
        self.saved = {operator: copy.copy(results) for operator, results in self.store.items()}
        for context, microbatch in zip(self.contexts, self.microbatches, strict=True):
            context.current = microbatch
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        for context, microbatch in zip(self.contexts, self.before, strict=True):
            context.current = microbatch
        self.store.update(self.saved)


@contextlib.contextmanager
def zero_bubble_compile_settings() -> Iterator[None]:
    """Let compiled layers run under a schedule that splits backward; for a trainer's process, not a library.

    Compiled backwards reuse the memory of saved activations (donated buffers), which a second pass through the
    graph still reads. Whether they do is no part of the key under which Inductor caches them, and code cached
    with the other setting gives wrong gradients without a word: the cache gets a directory of its own.

    Enter before anything compiles and leave after the last backward.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = os.path.join(cache_dir(), "kept_buffers")
    try:
        with torch._functorch.config.patch(donated_buffer=False):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
