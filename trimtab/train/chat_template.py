"""Conversations written by a tokenizer's chat template, and which of their tokens an assistant generates.

A template that marks what is generated (``{% generation %}``) is believed. Of any other, the turns of an assistant
are found by writing the conversation up to each of them: what a model is given before a turn must be the start of
the whole, and so must what ends with it. Where that does not hold the template rewrites the past, which is an error
and not a guess.

Shape suffix: N tokens.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trimtab.train.tokenizer import TokenizerConfig, load_pretrained

if TYPE_CHECKING:
    from trimtab.train.chat import ChatConfig
    from trimtab.train.conversations import Conversation

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # first and one-past-last character


class TemplateChat:
    """Conversations of a Hugging Face tokenizer.

    Args:
        tokenizer: transformers' tokenizer, one that tells where in the text its tokens are.
        template: Jinja source of the chat template.
        name: of the tokenizer, for messages.

    Raises:
        ValueError: the tokenizer does not tell where its tokens are.
    """

    def __init__(self, tokenizer: Any, template: str, *, name: str) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer {name!r} ({type(tokenizer).__name__}) does not tell where in a text its tokens are, so "
                "assistant turns cannot be found; use one that has a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._marked = _MARKED.search(template) is not None
        added = tokenizer.added_tokens_decoder.items()
        self._special = {number for number, token in added if token.special} | set(tokenizer.all_special_ids)
        self._warned = False

    @staticmethod
    def load(config: ChatConfig, tokenizer: TokenizerConfig) -> TemplateChat:
        """The tokenizer that is configured, with its own chat template or the one that is configured.

        Raises:
            ValueError: it cannot be loaded, or has no template.
        """
        if Path(tokenizer.name).is_file():
            raise ValueError(
                f"data.tokenizer.name={tokenizer.name!r} is a file, which holds no chat template; give the "
                "directory that it is in, with its tokenizer_config.json"
            )
        loaded = load_pretrained(tokenizer)
        if config.template is not None:
            template = Path(config.template).read_text(encoding="utf-8")
        elif loaded.chat_template is None:
            raise ValueError(
                f"tokenizer {tokenizer.name!r} has no chat template; give one with data.chat.template, a Jinja file"
            )
        else:
            template = loaded.get_chat_template()
        return TemplateChat(loaded, template, name=tokenizer.name)

    def encode(self, conversation: Conversation) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Ids, and which of them an assistant generates; see `trimtab.train.chat.ChatEncoder`."""
        text, spans = self._write(conversation, conversation.messages, marks=self._marked)
        if not self._marked:
            spans = self._spans(conversation, text)
        ids_N, predicted_N = self._masked(text, spans)
        self._close_turns(ids_N, predicted_N)
        return ids_N, predicted_N

    # ---------------------------------------------------------------- text

    def _write(
        self,
        conversation: Conversation,
        messages: Sequence[Any],
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> tuple[str, list[Span]]:
        """Text of some messages, and the characters that the template marks as generated."""
        try:
            from jinja2.exceptions import TemplateError
            from transformers.utils.chat_template_utils import render_jinja_template

            render: Any = render_jinja_template  # its annotations say less than it returns
            texts, spans = render(
                conversations=[list(messages)],
                tools=conversation.tools,
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except ImportError as error:
            raise ValueError(
                f"chat templates need the package jinja2 ({error}); pip install jinja2"
            ) from error
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"{conversation.place}: the chat template refuses this conversation: {error}; repair or delete the "
                "record"
            ) from error
        return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []

    def _text(self, conversation: Conversation, messages: Sequence[Any], *, prompt: bool = False) -> str:
        return self._write(conversation, messages, prompt=prompt)[0]

    def _spans(self, conversation: Conversation, text: str) -> list[Span]:
        """Characters of each turn of an assistant, of the template's ends of turns as well."""
        messages, spans = conversation.messages, []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise ValueError(
                    f"{conversation.place}: the conversation begins with an assistant turn, and the chat template "
                    f"does not mark what is generated; {_WAY_OUT}"
                )
            before = self._text(conversation, messages[:i], prompt=True)
            if not text.startswith(before):
                raise ValueError(
                    f"{conversation.place}, message {i + 1}: the chat template writes what comes before this turn "
                    f"differently once the turn is there ({_difference(before, text)}); {_WAY_OUT}"
                )
            spans.append((len(before), self._end(conversation, text, len(before), i)))
        return spans

    def _end(self, conversation: Conversation, text: str, start: int, i: int) -> int:
        """Where the turn of message i ends."""
        messages = conversation.messages
        if i == len(messages) - 1:
            return len(text)
        until = self._text(conversation, messages[: i + 1])
        if text.startswith(until):
            return len(until)
        # Some templates write a last turn differently from earlier ones, with thoughts that they drop later. The
        # turn is then what the message says and what closes it.
        content = messages[i]["content"].strip()
        _, found, closing = until.rpartition(content)
        said = len(text[start:]) - len(text[start:].lstrip())
        if content and found and closing and text.startswith(content + closing, start + said):
            return start + said + len(content + closing)
        raise ValueError(
            f"{conversation.place}, message {i + 1}: the chat template writes this turn differently once others "
            f"follow ({_difference(until, text)}); {_WAY_OUT}"
        )

    # ---------------------------------------------------------------- tokens

    def _masked(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
        """Tokens of the text, and which of them have a character of some span, as transformers counts them."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids_N = np.asarray(found["input_ids"], dtype=np.int64)
        first_N, end_N = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        predicted_N = np.zeros(len(ids_N), dtype=np.bool_)
        for start, stop in spans:
            # Tokens of nothing but spaces may be said to have no characters: they are where they end.
            inside_N = (end_N > start) & np.where(first_N == end_N, end_N <= stop, first_N < stop)
            predicted_N[self._without_tail(ids_N, np.flatnonzero(inside_N))] = True
        return ids_N, predicted_N

    def _without_tail(self, ids_N: NDArray[np.integer], places: NDArray[np.intp]) -> NDArray[np.intp]:
        """Places of a turn up to the token that ends it: line breaks behind it are the template's."""
        special = [at for at, place in enumerate(places) if int(ids_N[place]) in self._special]
        if not special:
            return places
        tail = places[special[-1] + 1 :]
        if len(tail) and self._tokenizer.decode(ids_N[tail].tolist()).strip():
            return places
        return places[: special[-1] + 1]

    def _close_turns(self, ids_N: NDArray[np.integer], predicted_N: NDArray[np.bool_]) -> None:
        """Close turns with the eos that follows them, and warn, once, if nothing ends them.

        ``predicted_N`` is changed in place: templates may mark a turn without the token that ends it.
        """
        last = np.flatnonzero(predicted_N & ~np.append(predicted_N[1:], False))
        follows = last[last + 1 < len(ids_N)] + 1
        predicted_N[follows[ids_N[follows] == self._tokenizer.eos_token_id]] = True
        last = np.flatnonzero(predicted_N & ~np.append(predicted_N[1:], False))
        if not self._warned and not np.isin(ids_N[last], list(self._special)).all():
            self._warned = True
            warnings.warn(
                "the chat template ends assistant turns without a special token: the model will not learn to stop; "
                "give a template with one in data.chat.template",
                stacklevel=4,
            )


_WAY_OUT = (
    "mark the assistant's turns in the template with {% generation %} and {% endgeneration %} and give it as "
    "data.chat.template"
)


def _difference(shorter: str, text: str) -> str:
    """Where a text stops to begin with another one."""
    at = next((i for i, (a, b) in enumerate(zip(shorter, text, strict=False)) if a != b), len(text))
    return f"{shorter[at : at + 30]!r} becomes {text[at : at + 30]!r}"
