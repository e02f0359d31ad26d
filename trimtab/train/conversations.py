"""Reads conversations: records such as ``{"messages": [{"role": "user", "content": "..."}, ...]}``.

What is wrong with a record is told with its file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.train.sources import Record, check_text, read_records

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIXED_CHAT = Path(__file__).with_name("fixed_chat.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One conversation.

    Args:
        messages: its turns, each with a "role" of `ROLES` and what else the template reads.
        tools: functions that the assistant may call, as JSON schemas; None for none.
        domain: kind of conversation.
        name: identifies it within the source.
        place: file and line, for messages.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    domain: str
    name: str
    place: str


def read_conversations(
    sources: Sequence[str],
    *,
    messages_field: str = "messages",
    tools_field: str = "tools",
    domain_field: str = "domain",
) -> Iterator[Conversation]:
    """Stream the conversations of `.jsonl` and `.parquet` files.

    Args:
        sources: files, directories or `domain=path`, as for text.
        messages_field: field or column with the list of messages.
        tools_field: optional field or column with the functions that the assistant may call.
        domain_field: optional field or column that holds a conversation's domain.

    Raises:
        ValueError: a record is no conversation, or one in which no assistant speaks; names file and line.
    """
    records = read_records(sources, field=messages_field, optional=(tools_field,), domain_field=domain_field)
    return (_conversation(record, messages_field, tools_field) for record in records)


def read_fixed_conversations() -> Iterator[Conversation]:
    """The conversations shipped with trimtab: two dozen short ones of two domains."""
    return read_conversations([str(_FIXED_CHAT)])


def _conversation(record: Record, field: str, tools_field: str) -> Conversation:
    place = record.place
    found = record.values[field]
    if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(
            f"{place}: field {field!r} must be a list of messages such as "
            f'{{"role": "user", "content": "..."}}, got {_shown(found)}; repair or delete the record'
        )
    messages = [_message(entry, f"{place}, message {i}") for i, entry in enumerate(found, start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(
            f"{place}: no message has the role 'assistant', so there is nothing to learn from it; delete the record"
        )
    tools = record.values.get(tools_field)
    if isinstance(tools, str):  # tables have no column type for schemas
        tools = _json(tools, f"{place}: field {tools_field!r}")
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"{place}: field {tools_field!r} must be a list of functions, got {_shown(tools)}; repair it, "
            "or set data.chat.tools_field to another name"
        )
    return Conversation(
        messages=messages, tools=tools or None, domain=record.domain, name=record.name, place=place
    )


def _message(entry: dict[str, Any], place: str) -> dict[str, Any]:
    message = {name: value for name, value in entry.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(
            f"{place}: 'role' must be one of {', '.join(ROLES)}, got {role!r}; "
            f"a message is {{'role': ..., 'content': ...}} and this one has {sorted(message)}"
        )
    if message.pop("weight", 1) not in (1, 1.0):
        raise ValueError(
            f"{place}: weight={entry['weight']!r} is not supported: every assistant turn is learned; make the turn "
            "the end of a shorter record, or remove the weight"
        )
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _tool_calls(calls, place)
    content = message.get("content")
    if isinstance(content, list):
        content = message["content"] = _joined(content, place)
    if content is None and calls:
        message["content"] = ""
    elif not isinstance(content, str):
        raise ValueError(
            f"{place}: 'content' must be text, got {_shown(content)}; repair or delete the record"
        )
    else:
        check_text(content, f"{place}: 'content'")
    return message


def _joined(parts: list[Any], place: str) -> str:
    """Content given as a list of parts."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{place}: 'content' has a part of type {kind!r}, and conversations are of text; remove it"
            )
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any, place: str) -> list[Any]:
    """Calls with arguments as objects, which templates expect, where a service wrote them as JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(
            f"{place}: 'tool_calls' must be a list of objects, got {_shown(calls)}; repair the record"
        )
    plain = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = _json(function["arguments"], f"{place}: 'arguments' of a tool call")
            call = {**call, "function": {**function, "arguments": arguments}}
        plain.append(call)
    return plain


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} must be JSON ({error}): {_shown(text)}; repair the record") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
