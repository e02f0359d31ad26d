"""Conversations as training text: what an assistant says is predicted, everything else is read.

A conversation becomes one document: the tokens of its messages as the tokenizer's chat template writes them, and a
mask of those that an assistant would have generated, the token that ends its turn included.

Shape suffix: N tokens.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab.train.conversations import Conversation
from trimtab.train.token_store import TokenStore, name_hash
from trimtab.train.tokenizer import ByteTokenizer, Tokenizer, TokenizerConfig

if TYPE_CHECKING:
    from trimtab.train.data import DataConfig

TooLong = Literal["truncate", "drop", "refuse"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """Supervised fine-tuning on conversations: the loss is of assistant turns alone.

    Args:
        enable: the source holds conversations, not text.
        messages_field: field or column with the list of messages.
        tools_field: optional field or column with the functions that the assistant may call.
        template: Jinja file that writes a conversation; None for the tokenizer's own. The byte tokenizer has one
            built in and takes no other.
        too_long: what becomes of a conversation longer than ``data.seq_len``: "truncate" keeps its start, "drop"
            leaves it out, "refuse" is an error. What is cut or left out is counted in a warning.

    Raises:
        ValueError: an empty name.
    """

    enable: bool = False
    messages_field: str = "messages"
    tools_field: str = "tools"
    template: str | None = None
    too_long: TooLong = "truncate"

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("messages_field", "tools_field"):
            if not getattr(self, name):
                raise ValueError(f"{name}='' names no field; set data.chat.{name}")
        if self.template is not None and not Path(self.template).is_file():
            raise ValueError(
                f"template={self.template!r} is no file; give data.chat.template a Jinja file, or leave it out for "
                "the tokenizer's own template"
            )
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if changed and not self.enable:
            warnings.warn(f"data.chat.{changed[0]} has no effect without data.chat.enable", stacklevel=3)


class ChatEncoder(Protocol):
    """Tokens of conversations."""

    def encode(self, conversation: Conversation) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """(N,) ids of a conversation, and (N,) bool: True for those that an assistant generates.

        Raises:
            ValueError: it cannot be written, or not so that assistant turns are known; names its place.
        """


class ByteChat:
    """Conversations in bytes: each turn is ``bos role newline content eos``."""

    def encode(self, conversation: Conversation) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Ids and mask; an assistant generates its content and the eos."""
        tokenizer = ByteTokenizer()
        turns: list[tuple[str, str]] = []
        if conversation.tools is not None:
            turns.append(("tools", json.dumps(conversation.tools, ensure_ascii=False)))
        for message in conversation.messages:
            lines = [message["content"]] if message.get("content") else []
            lines += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
            turns.append((message["role"], "\n".join(lines)))
        ids: list[NDArray[np.integer]] = []
        predicted: list[NDArray[np.bool_]] = []
        for role, content in turns:
            header, body = tokenizer.encode(f"{role}\n"), tokenizer.encode(content)
            ids += [np.array([tokenizer.bos_id]), header, body, np.array([tokenizer.eos_id])]
            generated = np.full(len(body) + 1, role == "assistant")
            predicted += [np.zeros(1 + len(header), dtype=np.bool_), generated]
        return np.concatenate(ids), np.concatenate(predicted)


def chat_encoder(config: ChatConfig, tokenizer: TokenizerConfig) -> ChatEncoder:
    """What writes conversations for a tokenizer.

    Raises:
        ValueError: the tokenizer has no chat template, or one was given to the byte tokenizer.
    """
    if tokenizer.name == "byte":
        if config.template is not None:
            raise ValueError(
                "data.chat.template has no meaning for the byte tokenizer, whose template is built in; remove it, "
                "or set data.tokenizer.name"
            )
        return ByteChat()
    from trimtab.train.chat_template import TemplateChat

    return TemplateChat.load(config, tokenizer)


def encode_conversations(
    conversations: Iterable[Conversation],
    encoder: ChatEncoder,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    too_long: TooLong = "truncate",
) -> TokenStore:
    """Tokens of conversations, one document each, with no token but those of the template.

    Args:
        conversations: consumed once, in order.
        encoder: what writes them.
        tokenizer: of the same ids.
        seq_len: S, the most tokens of one.
        too_long: as in `ChatConfig`.

    Returns:
        Documents of at most S tokens, none to be divided, each with a token of an assistant to predict.

    Raises:
        ValueError: there are no conversations, one is too long or has no token of an assistant.
    """
    dtype = np.dtype(np.uint16) if tokenizer.vocab_size <= 2**16 else np.dtype(np.uint32)
    tokens: list[NDArray[Any]] = []
    masks: list[NDArray[np.bool_]] = []
    names: list[str] = []
    order: list[int] = []
    num_read = num_long = num_lost = 0
    for conversation in conversations:
        num_read += 1
        ids_N, predicted_N = encoder.encode(conversation)
        # Nothing predicts the first token.
        if not predicted_N[1:].any():
            raise ValueError(
                f"{conversation.place}: the chat template writes no token of an assistant; delete the record"
            )
        if len(ids_N) > seq_len:
            if too_long == "refuse":
                raise ValueError(
                    f"{conversation.place}: {len(ids_N)} tokens are more than data.seq_len={seq_len}; raise it, or "
                    "set data.chat.too_long to truncate or drop"
                )
            num_long += 1
            ids_N, predicted_N = ids_N[:seq_len], predicted_N[:seq_len]
            if too_long == "drop" or not predicted_N[1:].any():
                num_lost += 1
                continue
        tokens.append(ids_N.astype(dtype))
        masks.append(predicted_N)
        names.append(conversation.domain)
        order.append(name_hash(f"{conversation.domain}\n{conversation.name}"))
    if not num_read:
        raise ValueError("the source holds no conversations; give at least one")
    if not tokens:
        raise ValueError(
            f"none of {num_read} conversations fits into data.seq_len={seq_len} tokens with something that its "
            "assistant says; raise it"
        )
    if num_long:
        warnings.warn(
            f"{num_long} of {num_read} conversations are longer than data.seq_len={seq_len} tokens: "
            f"{num_long - num_lost} were cut and {num_lost} left out; raise data.seq_len to keep them whole",
            stacklevel=3,
        )
    domains = tuple(sorted(set(names)))
    index = {domain: i for i, domain in enumerate(domains)}
    return TokenStore(
        tokens_N=np.concatenate(tokens),
        offsets_D=np.concatenate([[0], np.cumsum([len(ids) for ids in tokens])]).astype(np.int64),
        domain_ids_D=np.array([index[name] for name in names], dtype=np.int64),
        order_D=np.array(order, dtype=np.uint64),
        domains=domains,
        predicted_N=np.concatenate(masks),
        whole=True,
    )


def check_chat(data: DataConfig) -> None:
    """Check that the rest of a configuration goes with conversations.

    Raises:
        ValueError: it does not.
    """
    if data.source == "embedded":
        raise ValueError(
            "data.chat.enable: source='embedded' holds no conversations; give data.source files of them, or "
            "'fixed' for those shipped with trimtab"
        )
    if data.add_bos:
        raise ValueError(
            "add_bos=True puts a token before what the chat template writes, which opens conversations itself; "
            "set data.add_bos to False"
        )
    if data.source != "fixed" and data.text_field != "text":
        warnings.warn(
            "data.text_field has no effect with data.chat.enable; set data.chat.messages_field",
            stacklevel=4,
        )
