"""What goes beside the weights of an exported model: configuration, generation settings, tokenizer."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trimtab.train.tokenizer import Tokenizer, TokenizerConfig

_GENERATION = "generation_config.json"
# Files of a tokenizer or processor, in a directory that holds a model's too.
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "*processor_config.json",
)
_IDS = ("bos_id", "eos_id", "pad_id")


def write_config(
    folder: Path, stock: Any, *, dtype: torch.dtype, run: Mapping[str, Any], ids: Mapping[str, int | None]
) -> None:
    """Write the model's configuration and how it generates.

    Args:
        folder: to write into.
        stock: the model, without values.
        dtype: of its weights in the files.
        run: the run's configuration, from `to_dict`.
        ids: of special tokens, which a configuration for training leaves open; from `write_tokenizer`.
    """
    from transformers import GenerationConfig

    config = copy.deepcopy(stock.config)
    config.architectures = [type(stock).__name__]
    config.dtype = dtype
    text = config.get_text_config()
    text.use_cache = True
    for name, value in ids.items():
        if getattr(text, name, None) is None and value is not None:
            setattr(text, name, value)
    config.save_pretrained(folder)
    initial = (run.get("checkpoint") or {}).get("initial")
    known = Path(initial).expanduser() / _GENERATION if initial else None
    if known is not None and known.is_file():
        shutil.copyfile(known, folder / _GENERATION)
    elif stock.can_generate():
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def write_tokenizer(folder: Path, run: Mapping[str, Any]) -> tuple[list[str], dict[str, int | None]]:
    """Copy the tokenizer's files, where there are any.

    Args:
        folder: to write into.
        run: the run's configuration, from `to_dict`.

    Returns:
        Remarks for the user, and the ids of special tokens by their names in a configuration.
    """
    settings = run["data"]["tokenizer"]
    config = TokenizerConfig(**{key: value for key, value in settings.items() if key != "kind"})
    try:
        tokenizer = config.build()
        if config.name == "byte":
            return ["no tokenizer files: bytes are ids 0 to 255, then bos, eos, pad"], _ids(tokenizer)
        _copy_files(folder, config)
    except (ValueError, OSError) as error:
        # The weights are what takes hours.
        return [f"no tokenizer files ({error}); copy them to the directory"], {}
    return [], _ids(tokenizer)


def _ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _copy_files(folder: Path, config: TokenizerConfig) -> None:
    path = Path(config.name)
    if not path.exists():
        from transformers import AutoTokenizer

        loaded: Any = AutoTokenizer.from_pretrained(config.name, revision=config.revision or "main")
        loaded.save_pretrained(folder)
        return
    source = path if path.is_dir() else path.parent
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if path.is_file():
        shutil.copyfile(path, folder / "tokenizer.json")
