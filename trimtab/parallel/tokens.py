"""Which tokens of a batch a rank holds, when sequences are divided over cp and tp.

Shapes: B sequences, S length, s = S / (cp * tp) own tokens of each sequence, c = S / cp tokens that attention
on this rank has queries for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenShard:
    """One rank's tokens of every row.

    Under context parallelism a row is cut into 2 cp chunks and rank r takes chunks r and 2 cp - 1 - r, so
    that every rank has the same amount of causal attention. Those tokens are divided over tp in order.

    Args:
        queries_c: (c,) int64 positions in the row of the tokens that attention on this rank has queries for.
        own_s: (s,) int64 positions of this rank's own tokens: a contiguous part of ``queries_c``.
        keys_S: (S,) int64 positions of all tokens in the order in which cp ranks' tokens are gathered.
    """

    queries_c: Tensor
    own_s: Tensor
    keys_S: Tensor

    @staticmethod
    def make(seq_len: int, *, cp: int = 1, cp_rank: int = 0, tp: int = 1, tp_rank: int = 0) -> "TokenShard":
        """The tokens of one rank.

        Raises:
            ValueError: rows that cannot be divided.
        """
        unit = (2 * cp if cp > 1 else 1) * tp
        if seq_len % unit:
            parts = f"2 * cp * tp = {unit}" if cp > 1 else f"tp = {tp}"
            raise ValueError(
                f"seq_len={seq_len} must be a multiple of {parts}, so that ranks get equal shares"
            )
        positions_S = torch.arange(seq_len)
        if cp == 1:
            queries = [positions_S]
        else:
            chunks = positions_S.chunk(2 * cp)
            queries = [torch.cat([chunks[r], chunks[2 * cp - 1 - r]]) for r in range(cp)]
        return TokenShard(queries[cp_rank], queries[cp_rank].chunk(tp)[tp_rank], torch.cat(queries))

    def to(self, device: torch.device) -> "TokenShard":
        """The same shard with its index tensors on a device."""
        return TokenShard(self.queries_c.to(device), self.own_s.to(device), self.keys_S.to(device))

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all tokens."""
        return len(self.own_s) == len(self.keys_S)

    def flat_index(self, num_sequences: int) -> Tensor:
        """(B s,) int64 index of this rank's tokens in the flattened (B, S) batch, row by row."""
        rows_B1 = torch.arange(num_sequences, device=self.own_s.device)[:, None] * len(self.keys_S)
        return (rows_B1 + self.own_s).reshape(-1)
