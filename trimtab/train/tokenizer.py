"""Tokenizers behind one small protocol: bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_INSTALL = "install it with: pip install 'trimtab[train]'"


class Tokenizer(Protocol):
    """What the data pipeline and the checkpoints need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's embedding needs at least as many rows."""

    @property
    def bos_id(self) -> int | None:
        """Id that may open a document, or None where the tokenizer has none."""

    @property
    def eos_id(self) -> int:
        """Id that closes every document."""

    @property
    def pad_id(self) -> int:
        """Id that fills rows; may equal `eos_id`, since padding is masked."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids; equal if and only if the ids are."""

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of a text, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text, as from `encode`; faster for many."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Which tokenizer to use.

    Args:
        name: "byte", or a path to a `tokenizer.json`, or a directory or hub id that
            `transformers.AutoTokenizer.from_pretrained` loads; "model" is the directory of a model that has
            one (``model.path``). A file called "byte" is "./byte".
        eos_token: the token that closes a document, where the tokenizer declares none or another is meant.
        revision: commit or branch of a hub id.

    Raises:
        ValueError: an empty name, or an option that has no meaning for the named kind of tokenizer.
    """

    name: str = "byte"
    eos_token: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        """Check that the options fit the name."""
        if not self.name:
            raise ValueError("name='' names no tokenizer; give 'byte', a path or a hub id")
        for field in ("eos_token", "revision"):
            value = getattr(self, field)
            if self.name == "byte" and value is not None:
                raise ValueError(f"{field}={value!r} has no meaning for the byte tokenizer; remove {field}")
        if self.revision is not None and Path(self.name).exists():
            raise ValueError(
                f"revision={self.revision!r} has no meaning for the local path {self.name!r}; remove revision"
            )

    def build(self) -> Tokenizer:
        """Load the tokenizer.

        Raises:
            ValueError: the tokenizer can not be loaded, or has no end-of-document token.
        """
        if self.name == "byte":
            return ByteTokenizer()
        if self.name == "model":
            raise ValueError(
                "tokenizer name='model' is that of the model's directory, and the model has none; give "
                "--model.path with --module pretrained, or another name"
            )
        return _load_hugging_face(self)


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then bos, eos and pad. Lossless for every Python string."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258
    fingerprint = "byte-v1"

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of a text, uint8."""
        # surrogatepass: a lone surrogate, which JSON can hold, must come back too.
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8, which a model may emit, become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = list(ids)
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(
                f"id {wrong[0]} is outside the byte vocabulary [0, {self.vocab_size}); "
                f"the ids are from another tokenizer, or the model's logits were not cut to vocab_size"
            )
        encoded = bytes(i for i in ids if i < 256)
        try:
            return encoded.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return encoded.decode("utf-8", "replace")


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer; made by `TokenizerConfig(name=...).build()`.

    Args:
        vocab_size: one more than the largest id.
        bos_id: id that may open a document, if there is one.
        eos_id: id that closes a document.
        pad_id: id that fills rows.
        fingerprint: hash of everything that decides the ids.
        encode_batch: ids of many texts without special tokens.
        decode: text of ids without special tokens.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        fingerprint: str,
        encode_batch: Callable[[Sequence[str]], list[list[int]]],
        decode: Callable[[list[int]], str],
    ) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.fingerprint = fingerprint
        self._encode_batch = encode_batch
        self._decode = decode

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of a text, int64."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text, int64."""
        return [np.asarray(ids, dtype=np.int64) for ids in self._encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self._decode([int(i) for i in ids])


def _load_hugging_face(config: TokenizerConfig) -> HuggingFaceTokenizer:
    path = Path(config.name)
    if path.is_file():
        return _from_file(config, path)
    # A hub id has at most one slash and does not start like a path: no network for a mistyped path.
    looks_like_path = config.name.startswith((".", "/", "~")) or config.name.count("/") > 1
    if not path.is_dir() and (looks_like_path or path.suffix == ".json"):
        raise ValueError(
            f"tokenizer name={config.name!r} is a path that does not exist; "
            f"give 'byte', an existing tokenizer.json or directory, or a hub id such as 'org/model'"
        )
    return _from_pretrained(config)


def _from_file(config: TokenizerConfig, path: Path) -> HuggingFaceTokenizer:
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ValueError(
            f"tokenizer name={config.name!r} needs the package tokenizers; {_INSTALL}"
        ) from error
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(
            f"tokenizer file {path} is not a readable tokenizer.json ({error}); "
            f"give the tokenizer.json of a Hugging Face model, or the directory that holds its files"
        ) from error
    declared = _declared_specials(path.with_name("tokenizer_config.json"))
    specials = {name: backend.token_to_id(token) for name, token in declared.items()}
    known = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    eos_id = backend.token_to_id(config.eos_token) if config.eos_token else specials.get("eos_token")
    return _from_backend(backend, config, eos_id, specials.get("bos_token"), specials.get("pad_token"), known)


def _declared_specials(path: Path) -> dict[str, str]:
    """Special tokens that the tokenizer_config.json beside a tokenizer.json declares."""
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); repair it, or move it away") from error
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def load_pretrained(config: TokenizerConfig) -> Any:
    """transformers' own tokenizer of a directory or hub id.

    Raises:
        ValueError: it can not be loaded.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"tokenizer name={config.name!r} needs the package transformers; {_INSTALL}"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(config.name, revision=config.revision or "main")
    except Exception as error:  # every cause (no network, no such id, broken files) has its own class
        raise ValueError(
            f"tokenizer name={config.name!r} could not be loaded: {error}; "
            f"give 'byte', an existing tokenizer.json or directory, or a hub id that this machine can reach"
        ) from error


def _from_pretrained(config: TokenizerConfig) -> HuggingFaceTokenizer:
    tokenizer = load_pretrained(config)
    eos_id = tokenizer.eos_token_id
    if config.eos_token is not None:
        eos_id = tokenizer.get_vocab().get(config.eos_token)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = list(tokenizer.all_special_tokens)
    if backend is not None:
        return _from_backend(backend, config, eos_id, tokenizer.bos_token_id, tokenizer.pad_token_id, known)
    vocab = tokenizer.get_vocab()
    eos_id = _check_eos(eos_id, config, known)
    return HuggingFaceTokenizer(
        vocab_size=max(vocab.values()) + 1,
        bos_id=tokenizer.bos_token_id,
        eos_id=eos_id,
        pad_id=eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        fingerprint=_fingerprint(json.dumps([type(tokenizer).__name__, vocab], sort_keys=True), eos_id),
        encode_batch=lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def _from_backend(
    backend: Any,
    config: TokenizerConfig,
    eos_id: int | None,
    bos_id: int | None,
    pad_id: int | None,
    known: list[str],
) -> HuggingFaceTokenizer:
    # A tokenizer.json may carry the truncation of the run that saved it; documents are never cut here.
    backend.no_truncation()
    backend.no_padding()
    eos_id = _check_eos(eos_id, config, known)

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]

    return HuggingFaceTokenizer(
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        fingerprint=_fingerprint(backend.to_str(), eos_id),
        encode_batch=encode_batch,
        decode=lambda ids: backend.decode(ids, skip_special_tokens=True),
    )


def _check_eos(eos_id: int | None, config: TokenizerConfig, known: list[str]) -> int:
    if eos_id is not None:
        return eos_id
    given = "declares no end-of-document token"
    if config.eos_token is not None:
        given = f"has no token {config.eos_token!r}"
    raise ValueError(
        f"tokenizer name={config.name!r} {given}, and documents are separated by one; "
        f"set eos_token to one of its tokens (special tokens: {sorted(known)})"
    )


def _fingerprint(definition: str, eos_id: int) -> str:
    return "hf-" + hashlib.sha256(f"{eos_id}\n{definition}".encode()).hexdigest()[:32]
