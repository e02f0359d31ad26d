"""Which ranks hold tokens of the same step, as far as counting needs to know.

Gradients are the host trainer's business (`trimtab.scale.GradReduction`); these groups are for counts.
"""

from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenRanks:
    """Ranks among which the tokens of a step, and of each sequence, are divided.

    Every rank of a group must run the same model (or pipeline stage) with the same number of microbatches, and
    in each of them at least one MoE layer.
    Ranks that hold copies of the same tokens, such as tensor-parallel ranks that do not divide the
    sequence, are not in a group together: their tokens would count several times.

    Args:
        tokens: all ranks that hold different tokens of the step for the same layers: data-parallel ranks,
            times context- and tensor-parallel ones where those divide sequences. None for one rank.
        sequence: those of them that hold parts of the same sequences. None if no sequence is divided.
    """

    tokens: ProcessGroup | None = None
    sequence: ProcessGroup | None = None

    @property
    def num_ranks(self) -> int:
        """Ranks that share a step."""
        return 1 if self.tokens is None else self.tokens.size()

    @property
    def num_sequence_ranks(self) -> int:
        """Ranks that share a sequence."""
        return 1 if self.sequence is None else self.sequence.size()

    @property
    def is_first_of_step(self) -> bool:
        """Whether this rank speaks for what all ranks know alike."""
        return self.tokens is None or self.tokens.rank() == 0

    @property
    def is_first_of_sequence(self) -> bool:
        """Whether this rank speaks for its sequences."""
        return self.sequence is None or self.sequence.rank() == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenRanks":
        """Groups are of the process, and copies share them."""
        return self

    def __copy__(self) -> "TokenRanks":
        """Likewise."""
        return self

    def __reduce__(self) -> Any:
        """Groups cannot leave their process."""
        if self.tokens is None and self.sequence is None:
            return TokenRanks, ()
        raise TypeError(
            "a balancer that counts over several ranks cannot be pickled: its process groups belong to this "
            "process; call balancer.remove() first, or save the state dict"
        )
