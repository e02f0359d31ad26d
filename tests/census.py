"""Which memory is alive, tensor by tensor: exact, whoever holds it, between any two operators.

T tokens, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.no_sync import as_in_eager


@dataclass(frozen=True, slots=True)
class Piece:
    """One storage that an operator has made."""

    ref: StorageWeakRef
    num_bytes: int
    label: Any
    operator: str
    shape: tuple[int, ...]

    @property
    def alive(self) -> bool:
        return not self.ref.expired()


class Census(TorchDispatchMode):
    """Knows every storage that operators make while it is on, and whether it is still alive.

    What was there before is not counted. What operators of trimtab make inside of themselves is.

    Args:
        label: what to write on storages that are made from now on; may be changed at any time.
        samples: called with the number of bytes alive after each operator.
    """

    def __init__(self, label: Any = None, samples: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.label = label
        self.samples = samples
        self._pieces: dict[int, Piece] = {}
        self._eager: list[Any] = []

    def __enter__(self) -> "Census":
        self._eager.append(as_in_eager())
        self._eager[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.pop().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if func.namespace == "trimtab":
            with enable_reentrant_dispatch(), torch.no_grad(), self:
                result = OPDEFS[func.name().split(".")[0]]._init_fn(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id_of(leaf) not in before:
                self._note(leaf, func.overloadpacket.__name__)
        if self.samples is not None:
            self.samples(self.num_bytes)
        return result

    def _note(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        known = self._pieces.get(storage._cdata)
        if known is None or not known.alive:
            ref = StorageWeakRef(storage)
            # A weak reference keeps the address from being used again.
            self._pieces[storage._cdata] = Piece(
                ref, storage.nbytes(), self.label, operator, tuple(tensor.shape)
            )

    @property
    def alive(self) -> list[Piece]:
        """What is alive."""
        self._pieces = {address: piece for address, piece in self._pieces.items() if piece.alive}
        return list(self._pieces.values())

    @property
    def num_bytes(self) -> int:
        """Bytes alive."""
        return sum(piece.num_bytes for piece in self.alive)

    def at_least(self, num_bytes: int) -> list[str]:
        """What is alive and has so many bytes, in words."""
        return [
            f"{piece.shape} of {piece.operator}, {piece.label}"
            for piece in self.alive
            if piece.num_bytes >= num_bytes
        ]


def id_of(tensor: Tensor) -> int:
    """Address of a tensor's storage."""
    address: int = tensor.untyped_storage()._cdata
    return address
