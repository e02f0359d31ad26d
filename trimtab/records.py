"""Router records: what every layer's router made of its tokens, kept while somebody asks.

Shapes: T tokens, E experts, K top-k, B sequences, S length, L layers, M forwards (microbatches).

`trimtab.record_routing` opens records for a block, the hooks of `trimtab.taps` fill them, and they are read here.
Copies go to the host asynchronously where a device has to be waited for; joining them does not wait either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.host_copies import HostCopies
from trimtab.scores import ScoreName, scores

What = Literal["logits", "scores", "ids", "weights"]
WHATS: tuple[What, ...] = get_args(What)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One layer's routing in one forward, without history; None is what was not asked for.

    Args:
        logits_TE: (T, E) logits, before any selection bias.
        scores_TE: (T, E) scores s of these logits by the family's score function (`trimtab.scores`): before the
            selection bias and not normalised, float32 at least.
        ids_TK: (T, K) experts chosen.
        weights_TK: (T, K) their weights as the experts are given them.
        num_sequences: B, rows of the batch that the tokens are, row after row; 0 for some tokens of rows.
    """

    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    num_sequences: int = 1

    def __getitem__(self, what: What) -> Tensor:
        """(T, E) or (T, K) "logits", "scores", "ids" or "weights".

        Raises:
            KeyError: not asked for.
        """
        value = {
            "logits": self.logits_TE,
            "scores": self.scores_TE,
            "ids": self.ids_TK,
            "weights": self.weights_TK,
        }.get(what)
        if value is None:
            raise KeyError(
                f"{what!r} was not recorded; ask for it: record_routing(..., what=({what!r}, ...))"
            )
        return value

    def by_sequence(self, what: What) -> Tensor:
        """(B, S, E) or (B, S, K) of the same, as the model was given its tokens.

        Raises:
            KeyError: not asked for.
            ValueError: the tokens do not divide into rows of one length.
        """
        value = self[what]
        num_tokens = value.shape[0]
        if self.num_sequences < 1 or num_tokens % self.num_sequences:
            raise ValueError(
                f"{num_tokens} tokens are not rows of one length: this forward held a part of "
                "its batch (balancer.microbatch(tokens=...)); read them in the order of these tokens"
            )
        return value.unflatten(0, (self.num_sequences, num_tokens // self.num_sequences))


class RoutingRecords(Mapping[str, tuple[Record, ...]]):
    """Records by layer: ``records["model.layers.0.mlp.gate"][0].ids_TK`` of its first forward.

    Layers are those of this rank, in the order of the model, under the names they have without wrappers. Forwards
    are in the order in which they began, which is that of `trimtab.Balancer.interleaved`'s microbatches where they
    run by turns. Every token is there, padding as well, in the order of the model.

    Args:
        names: all layers that may run.
        what: what is kept.
        copies: takes tensors to the host.
    """

    def __init__(self, names: Sequence[str], what: Sequence[What], copies: HostCopies) -> None:
        self.what = tuple(what)
        self._copies = copies
        self._forwards: dict[str, list[tuple[int, Record]]] = {name: [] for name in names}

    # ---------------------------------------------------------------- writing

    def add(
        self,
        name: str,
        score: ScoreName,
        ticket: int,
        num_sequences: int,
        logits_TE: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
    ) -> None:
        """Keep copies of one layer's routing of one microbatch.

        Args:
            name: of the layer.
            score: its score function.
            ticket: of the forward; they rise.
            num_sequences: B.
            logits_TE: (T, E).
            ids_TK: (T, K).
            weights_TK: (T, K).
        """
        kept: dict[What, Tensor] = {}
        with torch.no_grad():
            for what in self.what:
                if what == "scores":
                    kept[what] = self._copies.send(scores(logits_TE, score))
                    continue
                given = {"logits": logits_TE, "ids": ids_TK, "weights": weights_TK}[what]
                # The model, or a compiler that plans memory, may write into these later.
                kept[what] = self._copies.send(given, may_change=True)
        record = Record(
            logits_TE=kept.get("logits"),
            scores_TE=kept.get("scores"),
            ids_TK=kept.get("ids"),
            weights_TK=kept.get("weights"),
            num_sequences=num_sequences,
        )
        self._forwards[name].append((ticket, record))

    # ---------------------------------------------------------------- reading

    @property
    def names(self) -> tuple[str, ...]:
        """Layers that ran, in the order of the model."""
        return tuple(name for name, forwards in self._forwards.items() if forwards)

    @property
    def num_forwards(self) -> int:
        """M, of the layer that ran most."""
        return max((len(forwards) for forwards in self._forwards.values()), default=0)

    def __getitem__(self, name: str) -> tuple[Record, ...]:
        """Records of one layer, one for each forward in order.

        Raises:
            KeyError: no such layer ran.
        """
        if not self._forwards.get(name):
            raise KeyError(f"no layer {name!r} ran while records were taken; those that ran: {self.names}")
        return tuple(record for _, record in sorted(self._forwards[name], key=lambda entry: entry[0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        """L, layers that ran."""
        return len(self.names)

    def stacked(self, what: What, microbatch: int | None = None) -> Tensor:
        """All layers in one tensor; does not wait for copies.

        Args:
            what: "logits", "scores", "ids" or "weights".
            microbatch: one forward, from 0; None for all.

        Returns:
            (M, L, T, E) or (M, L, T, K), layers in the order of `names`; without M for one forward.

        Raises:
            KeyError: not asked for, or no such forward.
            ValueError: nothing was recorded, or layers or forwards differ in shape or number.
        """
        num_forwards = self._check_complete()
        if microbatch is None:
            self._check_sizes(what, range(num_forwards))
            return torch.stack([self._layers(what, number) for number in range(num_forwards)])
        if not -num_forwards <= microbatch < num_forwards:
            raise KeyError(f"microbatch={microbatch} of {num_forwards} forwards that were recorded")
        self._check_sizes(what, [microbatch])
        return self._layers(what, microbatch)

    def joined(self, what: What = "ids", length: int | None = None) -> dict[str, Tensor]:
        """All forwards as if they had been one, each continuing the sequences of the one before.

        Generation runs a prompt and then token after token. Joined, its records are of whole sequences, as a
        training forward sees them.

        Args:
            what: "logits", "scores", "ids" or "weights".
            length: S of the result, ids only: places behind the recorded ones get -1, which
                `trimtab.replay_routing` leaves to the router. The last token that is generated never runs through
                the model, for one.

        Returns:
            By layer (B S, E) or (B S, K), to be given to `trimtab.replay_routing` as one microbatch.

        Raises:
            ValueError: forwards of different numbers of sequences, or longer than ``length``.
        """
        if length is not None and what != "ids":
            raise ValueError(f"length={length} pads ids with -1, and {what} with nothing; leave it out")
        num_forwards = self._check_complete()
        result = {}
        for name in self.names:
            parts = [record.by_sequence(what) for record in self[name]]
            batches = {part.shape[0] for part in parts}
            if len(batches) > 1:
                raise ValueError(
                    f"{name}: {num_forwards} forwards of {sorted(batches)} sequences do not continue each other; "
                    "joined() is for the forwards of one generation"
                )
            whole = torch.cat(parts, dim=1)
            if length is not None:
                missing = length - whole.shape[1]
                if missing < 0:
                    raise ValueError(
                        f"{name}: {whole.shape[1]} tokens of each sequence were recorded, more than length={length}"
                    )
                whole = torch.cat(
                    [
                        whole,
                        torch.full(
                            (whole.shape[0], missing, whole.shape[2]),
                            -1,
                            dtype=whole.dtype,
                            device=whole.device,
                        ),
                    ],
                    dim=1,
                )
            result[name] = whole.flatten(0, 1)
        return result

    def _layers(self, what: What, number: int) -> Tensor:
        """(L, T, ...) of one forward."""
        return torch.stack([self[name][number][what] for name in self.names])

    def _check_complete(self) -> int:
        """M, if every layer that ran at all ran in each forward."""
        if not self.names:
            raise ValueError("nothing was recorded: no router ran while records were taken")
        for name in self.names:
            if len(self._forwards[name]) != self.num_forwards:
                raise ValueError(
                    f"{name} ran {len(self._forwards[name])} times and another layer {self.num_forwards} times; "
                    f"read layers one by one, as in records[{name!r}]"
                )
        return self.num_forwards

    def _check_sizes(self, what: What, numbers: Sequence[int]) -> None:
        first: tuple[str, torch.Size] | None = None
        for name in self.names:
            for number in numbers:
                shape = self[name][number][what].shape
                if first is None:
                    first = name, shape
                elif shape != first[1]:
                    raise ValueError(
                        f"{what} of {name} in forward {number} have shape {tuple(shape)}, those of {first[0]} "
                        f"{tuple(first[1])}: they do not stack; give microbatch=... for one forward, or read "
                        "layers one by one"
                    )
