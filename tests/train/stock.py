"""Stock models divided by any plan, and directories of their weights, for tests of reading and exporting."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.hf_models import tiny_model
from tests.parallel.checkpointing import Divided
from tests.parallel.pool import mesh_of
from trimtab.integrations.experts import use_trimtab_experts
from trimtab.integrations.parallel import decoder_layers, parallelize
from trimtab.integrations.stages import split_into_stages
from trimtab.parallel.fsdp import shard_parameters
from trimtab.parallel.mesh import Degrees
from trimtab.train.checkpoint_state import LocalState, State
from trimtab.train.hf_checkpoint import read_initial

FAMILIES = (
    "deepseek_v3",
    "deepseek_v2",
    "llama4",
    "qwen3_moe",
    "qwen3_vl_moe",
    "qwen3_5_moe",
    "gpt_oss",
    "mixtral",
    "olmoe",
    "glm4_moe",
)


def divide(family: str, degrees: Degrees | None, *, seed: int, **settings: Any) -> Divided:
    """This rank's part of a tiny stock model, or all of it."""
    model: Any = tiny_model(family, seed=seed, **settings)[0]
    if degrees is None:
        return Divided(family, [model])
    mesh = mesh_of(degrees)
    use_trimtab_experts(model)
    if degrees.pp > 1:
        model = split_into_stages(model, num_stages=degrees.pp, stage=mesh.rank("pp"))
    divided = parallelize(model, mesh)
    shard_parameters(model, mesh, layers=decoder_layers(model), experts=divided.experts, heads=divided.heads)
    return Divided(family, [model])


def state_of(divided: Divided) -> State:
    """What is to be read on this rank."""
    return LocalState(divided.modules, divided.optimizer).model


def read(folder: Path, divided: Divided, **options: Any) -> None:
    read_initial(folder, divided.modules, state_of(divided), **options)


def wrong(divided: Divided, expected: Divided) -> list[str]:
    """Names of this rank's tensors that are not the same bits as in another model that is divided likewise."""
    found, right = divided.local(), expected.local()
    assert found.keys() == right.keys()
    return [name for name, value in found.items() if not torch.equal(value, right[name])]


def save(model: nn.Module, folder: Path, **options: Any) -> Path:
    """The directory that stock transformers writes."""
    stock: Any = model
    stock.save_pretrained(folder, **options)
    return folder


def save_all(root: Path) -> dict[str, Path]:
    """A directory of each family, in several files."""
    return {f: save(tiny_model(f)[0], root / f, max_shard_size="40KB") for f in FAMILIES}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Apply a change to the tensors of all files of a directory, and write them as one."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **changes: Any) -> None:
    """Change settings of a directory's configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Bytes of this process, without files that are mapped into it, beyond those at the start."""
    start, seen, done = _own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(_own_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _own_bytes() -> int:
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
