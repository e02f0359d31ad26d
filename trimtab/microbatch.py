"""What the tokens of one forward are: which of them count, and which sequence or document each is in.

Shapes: B sequences, S length, T = B S tokens, G groups (the finest any objective asks for).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.counts import Unit, place_of

_NO_TICKET = torch.zeros((), dtype=torch.int64, device="cpu")


class Microbatch:
    """One forward of the model, as the routers' hooks see it.

    Args:
        active: its tokens count (training), or they do not (evaluation, ``no_grad``).
        num_tokens_G: (G,) int64 valid tokens of each group.
        num_rows: T, tokens of the forward, valid or not.
        num_sequences: B.
        group_ids_T: (T,) int64 group of each token; None for contiguous groups of T / G tokens.
        valid_mask_T: (T,) bool, True counts; None for all.
        sequence_of_group_G: (G,) int64 sequence of each document; None if groups are not documents.
    """

    def __init__(
        self,
        active: bool,
        num_tokens_G: Tensor,
        num_rows: int,
        num_sequences: int,
        group_ids_T: Tensor | None = None,
        valid_mask_T: Tensor | None = None,
        sequence_of_group_G: Tensor | None = None,
    ) -> None:
        self.active = active
        self.num_tokens_G = num_tokens_G
        self.num_rows = num_rows
        self.num_sequences = num_sequences
        self.group_ids_T = group_ids_T
        self.valid_mask_T = valid_mask_T
        self.sequence_of_group_G = sequence_of_group_G
        self.ticket = _NO_TICKET  # () int64 on the CPU, names the forward
        self.is_part = False  # some tokens of its rows, as `take` says
        self.by_turns = False  # parts of its forward say themselves whose they are
        self.tap: Any = None  # `trimtab.taps.Tap`: what is recorded or replayed of its forward

    @property
    def parts(self) -> "tuple[Microbatch, ...]":
        """Itself; a `Concatenation` has several."""
        return (self,)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """(T, ...) values of each part."""
        return (values,)

    def with_active(self, active: bool) -> "Microbatch":
        """The same tokens in a forward of their own, counting or not."""
        made = Microbatch(
            active,
            self.num_tokens_G,
            self.num_rows,
            self.num_sequences,
            self.group_ids_T,
            self.valid_mask_T,
            self.sequence_of_group_G,
        )
        made.is_part = self.is_part
        return made

    def take(self, tokens_T: Tensor) -> "Microbatch":
        """One rank's tokens of it; groups keep the sizes that they have on all ranks together.

        Args:
            tokens_T: (t,) int64 places in the flattened (B, S) batch.
        """
        group_ids_T, num_groups = self.group_ids_T, len(self.num_tokens_G)
        if group_ids_T is None and num_groups > 1:
            group_ids_T = torch.arange(num_groups, device=tokens_T.device).repeat_interleave(
                self.num_rows // num_groups
            )
        taken = Microbatch(
            self.active,
            self.num_tokens_G,
            len(tokens_T),
            self.num_sequences,
            None if group_ids_T is None else group_ids_T[tokens_T],
            None if self.valid_mask_T is None else self.valid_mask_T[tokens_T],
            self.sequence_of_group_G,
        )
        taken.is_part = True
        return taken

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch on a router's device."""
        if self.num_tokens_G.device == device:
            return self
        group_ids_T, valid_mask_T, sequence_of_group_G = (
            None if tensor is None else tensor.to(device)
            for tensor in (self.group_ids_T, self.valid_mask_T, self.sequence_of_group_G)
        )
        moved = Microbatch(
            self.active,
            self.num_tokens_G.to(device),
            self.num_rows,
            self.num_sequences,
            group_ids_T,
            valid_mask_T,
            sequence_of_group_G,
        )
        moved.ticket, moved.tap = self.ticket, self.tap
        return moved


class Concatenation:
    """Several microbatches in one forward: the tokens of each follow those of the one before.

    Args:
        parts: the microbatches, in the order of their tokens.
    """

    def __init__(self, parts: Sequence[Microbatch]) -> None:
        self.parts = tuple(parts)
        self.active = self.parts[0].active
        self.num_rows = sum(part.num_rows for part in self.parts)
        self.by_turns = False
        # Nothing but its length is read: a compiled layer takes integers that it finds on modules for constants.
        self._rows = tuple(torch.empty(part.num_rows, 0) for part in self.parts)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """(T, ...) values of each part."""
        return values.split([rows.shape[0] for rows in self._rows])

    def with_active(self, active: bool) -> "Concatenation":
        """The same tokens in a forward of their own, counting or not."""
        return Concatenation([part.with_active(active) for part in self.parts])

    def to(self, device: torch.device) -> "Concatenation":
        """The same microbatches on a router's device."""
        if all(part.num_tokens_G.device == device for part in self.parts):
            return self
        return Concatenation([part.to(device) for part in self.parts])


class Context:
    """What the hooks of one model share.

    Args:
        unit: groups that objectives tell apart within a microbatch; None if none does.
    """

    def __init__(self, unit: Unit | None) -> None:
        self.unit = unit
        self.current: Microbatch | Concatenation | None = None
        self.running = False  # inside the model's forward, or a part of it that `in_run` says
        self.in_run = False  # inside a part of one of several forwards that run by turns
        self.interleaved = False  # several forwards run by turns, and this may be between two parts of them
        self.explicit: Microbatch | Concatenation | None = None  # given for the forwards in a with block
        self.divided = False  # sequences are divided over ranks, which no call of the model shows
        self.counting = False  # inside a counting pass, where gradients are off but tokens count
        self.argument_names: tuple[str, ...] = ()
        self.stock_loss: str | None = None  # what to say once if a call asks for the model's own loss
        self.module: Any = None  # whose forward tells the batch
        self.ledger: Any = None  # to be told when a forward ends; None if its counts stay on this rank
        self.taps: Any = None  # `trimtab.taps.Taps`: what is recorded or replayed; None while nobody asks
        self.ends_with_block = False  # hooks are taken off with a block, and backward may come after it
        self._clock = torch.zeros((), dtype=torch.int64, device="cpu")
        self._even: tuple[Any, Tensor] | None = None  # numbers of tokens of the last batch without padding

    def number(self, microbatch: Microbatch | Concatenation) -> None:
        """Give each microbatch of a forward its ticket."""
        for part in microbatch.parts:
            # Arithmetic of tensors, because a compiled forward would take an integer for a constant.
            self._clock = self._clock + 1
            part.ticket = self._clock
            if self.taps is not None:
                part.tap = self.taps.tap(part, self.counting)

    def even_groups(self, num_groups: int, num_tokens: int, device: torch.device) -> Tensor:
        """(G,) numbers of tokens of groups of one size: one tensor for batches of one shape, never written to.

        What follows from it alone then need not be formed for each batch (`trimtab.counts.TokenGroups`).
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _even_groups(num_groups, num_tokens, device)
        if torch._C._len_torch_dispatch_stack() > 0:
            # A tensor of that mode, perhaps, and of no use without it.
            return _even_groups(num_groups, num_tokens, device)
        place = place_of(device)
        if place is None:
            return _even_groups(num_groups, num_tokens, device)
        key = (num_groups, num_tokens, place)
        if self._even is None or self._even[0] != key:
            self._even = key, _even_groups(num_groups, num_tokens, device)
        return self._even[1]

    def __getstate__(self) -> dict[str, Any]:
        """All but a stream, which is of this process."""
        return {**self.__dict__, "_even": None}


class Description:
    """Tokens that the user described: for the forwards in a ``with`` block, or one of several forwards at a time.

    Args:
        context: of the model.
        microbatch: the tokens.
    """

    def __init__(self, context: Context, microbatch: Microbatch | Concatenation) -> None:
        self.context = context
        self.microbatch = microbatch
        self._outer: list[Microbatch | Concatenation | None] = []

    def __enter__(self) -> None:
        """Describe the forwards that follow.

        Raises:
            RuntimeError: inside `Balancer.interleaved`.
        """
        if self.context.interleaved:
            raise RuntimeError(
                "balancer.microbatch(...) is entered inside balancer.interleaved(...), whose microbatches are "
                "described already; give the description to interleaved([...]) instead of entering it"
            )
        self._outer.append(self.context.explicit)
        self.context.explicit = self.microbatch

    def __exit__(self, *error: object) -> None:
        """What described forwards before does so again: a block around this one, or the calls."""
        self.context.explicit = self._outer.pop()


def describe(
    unit: Unit | None,
    *,
    active: bool,
    batch_shape: tuple[int, int],
    device: torch.device,
    valid_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_documents: int | None = None,
    even_groups: Callable[[int, int, torch.device], Tensor] | None = None,
) -> Microbatch:
    """Describe a batch of B rows of S tokens.

    Args:
        unit: "document" splits rows at document starts, "sequence" groups by row, None puts all tokens
            in one group.
        active: whether its tokens count.
        batch_shape: (B, S).
        device: where the routers run.
        valid_mask: (B, S) bool or integer, nonzero counts; None for all.
        cu_seqlens: (documents + 1,) offsets of documents in the flattened tokens, from 0; tokens after
            the last offset are one more document. Documents do not cross rows.
        position_ids: (B, S) or (1, S) positions that restart at 0 with each document, or several axes of them,
            (4, B, S) with the place in the document first or (3, B, S) of rotary ones alone; read only without
            ``cu_seqlens``.
        num_documents: how many documents there are at most, counting each part of one that rows divide; more
            than there are cost G groups of counts, which stay empty.
        even_groups: (groups, tokens of each, device) -> (G,) numbers of tokens; see `Context.even_groups`.

    Returns:
        The microbatch. Of documents from ``position_ids``, without ``num_documents``, the number is read from the
        device, which waits for it once; nothing else here waits.

    Raises:
        ValueError: a mask, offsets or positions whose shape does not fit, or on the CPU, where it can be seen,
            more documents than ``num_documents``.
    """
    num_sequences, length = batch_shape
    num_rows = num_sequences * length
    valid_mask_T = None
    if valid_mask is not None:
        if tuple(valid_mask.shape) != (num_sequences, length):
            raise ValueError(
                f"the mask has shape {tuple(valid_mask.shape)}, expected (batch, length) = "
                f"{(num_sequences, length)}: one value per token, nonzero where the token counts; pass such a "
                "mask with balancer.microbatch(valid_mask=...) if the model itself needs another form"
            )
        valid_mask_T = (valid_mask != 0).reshape(-1).to(device)
    if unit == "document" and (cu_seqlens is not None or position_ids is not None):
        starts_T = _document_starts(batch_shape, device, cu_seqlens, position_ids)
        group_ids_T = starts_T.cumsum(0) - 1
        num_groups = min(_most_documents(starts_T, num_sequences, cu_seqlens, num_documents), num_rows)
        sequence_T = torch.arange(num_rows, device=device) // max(length, 1)
        sequence_of_group_G = torch.zeros(num_groups, dtype=torch.int64, device=device)
        sequence_of_group_G = sequence_of_group_G.scatter_(0, group_ids_T, sequence_T)
        ones_T = torch.ones_like(group_ids_T) if valid_mask_T is None else valid_mask_T.to(torch.int64)
        num_tokens_G = torch.zeros_like(sequence_of_group_G).index_add_(0, group_ids_T, ones_T)
        return Microbatch(
            active, num_tokens_G, num_rows, num_sequences, group_ids_T, valid_mask_T, sequence_of_group_G
        )
    num_groups = 1 if unit is None else num_sequences
    if valid_mask_T is None:
        form = _even_groups if even_groups is None else even_groups
        num_tokens_G = form(num_groups, num_rows // max(num_groups, 1), device)
    else:
        num_tokens_G = valid_mask_T.view(num_groups, num_rows // max(num_groups, 1)).sum(dim=1)
    return Microbatch(active, num_tokens_G, num_rows, num_sequences, None, valid_mask_T)


def _even_groups(num_groups: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.full((num_groups,), num_tokens, device=device)


def _most_documents(
    starts_T: Tensor, num_sequences: int, cu_seqlens: Tensor | None, num_documents: int | None
) -> int:
    """G, documents to make room for: as many as there are, or more where their number is not on the host."""
    if num_documents is None and cu_seqlens is None:
        return int(starts_T.sum())
    if num_documents is None:
        assert cu_seqlens is not None
        # Each offset starts one, and so does each row. The first offset starts the first row.
        return len(cu_seqlens) - 1 + num_sequences
    if starts_T.device.type == "cpu" and not torch.compiler.is_compiling():
        found = int(starts_T.sum())
        if found > num_documents:
            raise ValueError(
                f"num_documents={num_documents}, but there are {found}; give the most that there may be, counting "
                "each part of a document that rows divide"
            )
    return num_documents


def _document_starts(
    batch_shape: tuple[int, int],
    device: torch.device,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
) -> Tensor:
    """(T,) bool, True at the first token of each document and of each row."""
    num_sequences, length = batch_shape
    starts_T = torch.zeros(num_sequences * length + 1, dtype=torch.bool, device=device)
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens must be a 1-D integer tensor of document offsets, given "
                f"{tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
            )
        # The last offset may be T itself: the extra place takes it. (Assigning to indexed places would copy the
        # value to the device and wait.)
        starts_T.index_fill_(0, cu_seqlens.to(device, torch.int64), True)
    else:
        assert position_ids is not None
        if position_ids.dim() == 3:
            # Of time, height and width only a document's first token has 0 in all: an image's tokens share one.
            position_ids = position_ids[0] if len(position_ids) == 4 else position_ids.amax(dim=0)
        if position_ids.dim() != 2 or position_ids.shape[1] != length:
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}, expected {(num_sequences, length)} to "
                "find documents in; pass cu_seqlens, or balancer.microbatch(cu_seqlens=...)"
            )
        resets_BS = (position_ids == 0).to(device).expand(num_sequences, length)
        starts_T[:-1] = resets_BS.reshape(-1)
    starts_T = starts_T[:-1].view(num_sequences, length)
    starts_T[:, :1] = True
    return starts_T.reshape(-1)


def describe_given(
    context: Context,
    device: torch.device,
    *,
    batch_shape: tuple[int, int] | None,
    valid_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    num_documents: int | None,
    tokens: Tensor | None,
) -> Description:
    """Describe what the user says of a forward; see `trimtab.balancer.Balancer.microbatch`.

    Args:
        context: of the model.
        device: where the routers run, for a description without tensors.
        batch_shape: (B, S).
        valid_mask: (B, S).
        cu_seqlens: document offsets.
        position_ids: (B, S).
        num_documents: at most.
        tokens: (t,) of this rank.
    """
    if tokens is None and context.divided:
        raise ValueError(
            "sequences are divided over ranks.sequence; say which tokens of the whole (B, S) batch this rank "
            "has: balancer.microbatch(tokens=...), with everything else describing the whole batch"
        )
    known = valid_mask if valid_mask is not None else position_ids
    if batch_shape is None:
        if known is None:
            raise ValueError("say batch_shape=(B, S), or give valid_mask or position_ids of that shape")
        batch_shape = (known.shape[-2], known.shape[-1])  # positions may have axes of their own in front
    device = next((t.device for t in (valid_mask, position_ids, cu_seqlens) if t is not None), device)
    described = describe(
        context.unit,
        active=True,
        batch_shape=batch_shape,
        device=device,
        valid_mask=valid_mask,
        cu_seqlens=cu_seqlens,
        position_ids=position_ids,
        num_documents=num_documents,
        even_groups=context.even_groups,
    )
    return Description(context, described if tokens is None else described.take(tokens.to(device)))


def read_call(context: Context, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Microbatch:
    """Describe the batch that a model's forward was called with.

    Reads ``input_ids`` or ``inputs_embeds`` (or the first tensor), a two-dimensional ``attention_mask``,
    ``position_ids`` and ``cu_seq_lens_q`` / ``cu_seqlens``, by name or position.
    """
    given = {**dict(zip(context.argument_names, args, strict=False)), **kwargs}
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:
        tokens = next((value for value in given.values() if isinstance(value, Tensor)), None)
    if tokens is None:
        raise ValueError(
            f"{type(module).__name__} was called without a tensor to read the batch shape from; call it inside "
            "balancer.microbatch(batch_shape=(B, S))"
        )
    # (B, S) token ids, whatever they are called, or (B, S, D) embeddings; (T, D) is one row.
    if tokens.dim() >= 3 or (tokens.dim() == 2 and not tokens.is_floating_point()):
        batch_shape = (tokens.shape[0], tokens.shape[1])
    else:
        batch_shape = (1, tokens.shape[0])
    active = context.counting or (torch.is_grad_enabled() and module.training)
    if not active:
        return describe(None, active=False, batch_shape=batch_shape, device=tokens.device)
    if context.divided:
        raise ValueError(
            f"{type(module).__name__} was called with a part of each sequence (ranks.sequence); call it inside "
            "balancer.microbatch(batch_shape=(B, S), tokens=...), which says what the whole is"
        )
    if (
        active
        and context.stock_loss
        and not torch.compiler.is_compiling()
        and given.get("output_router_logits")
    ):
        warnings.warn(context.stock_loss, stacklevel=2)
        context.stock_loss = None
    valid_mask = given.get("attention_mask")
    if valid_mask is not None and not (isinstance(valid_mask, Tensor) and valid_mask.dim() == 2):
        form = tuple(valid_mask.shape) if isinstance(valid_mask, Tensor) else type(valid_mask).__name__
        raise ValueError(
            f"attention_mask is {form}, from which padding cannot be read; call the model inside "
            "balancer.microbatch(batch_shape=(B, S), valid_mask=...), with valid_mask (B, S) or None"
        )
    cu_seqlens = given.get("cu_seq_lens_q")
    return describe(
        context.unit,
        active=True,
        batch_shape=batch_shape,
        device=tokens.device,
        valid_mask=valid_mask,
        cu_seqlens=cu_seqlens if cu_seqlens is not None else given.get("cu_seqlens"),
        position_ids=given.get("position_ids"),
        even_groups=context.even_groups,
    )


class Follow(torch.autograd.Function):
    """Identity on the loss; its backward records the gradient that the trainer starts from."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, context: Context, ledger: Any) -> Tensor:
        """Identity."""
        ctx.context, ctx.ledger, ctx.microbatch = context, ledger, context.current
        # A copy and not a view: a loss may be divided in place.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Identity, and the scale is kept."""
        ctx.ledger.loss_scale = grad.detach()
        ctx.context.current = ctx.microbatch
        return grad, None, None
