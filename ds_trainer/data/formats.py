"""From one record to a text or a conversation: one pure function a format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Format = Literal["text", "messages", "prompt_response", "alpaca"]
Record = Mapping[str, Any]
"""One object of a file: whatever JSON can hold."""
Conversation = list[dict[str, str]]
"""Messages `{"role": ..., "content": ...}`: a system message at most, then user and assistant in turn."""

ROLES = ("system", "user", "assistant")


class BadRecordError(ValueError):
    """A record that cannot be trained on. The text says what was found, the rule and the fix; the caller knows where."""


def text(record: Record) -> str:
    """`{"text": ...}`: a document to pretrain on.

    Raises:
        BadRecordError: the text is missing or is no text.
    """
    return _string(record, "text")


def messages(record: Record) -> Conversation:
    """`{"messages": [{"role": ..., "content": ...}, ...]}`.

    Raises:
        BadRecordError: a wrong type, an unknown role, or roles out of order.
    """
    turns = _present(record, "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRecordError(f"`messages` is {_kind(turns)}; it must be a list of messages, at least user and assistant")
    conversation = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    _check_roles([message["role"] for message in conversation])
    return conversation


def prompt_response(record: Record) -> Conversation:
    """`{"prompt": ..., "response": ...}`; the answer may also be called `completion`.

    Raises:
        BadRecordError: a missing or doubled answer, or a wrong type.
    """
    if "response" in record and "completion" in record:
        raise BadRecordError("has both `response` and `completion`; one of them is the answer, remove the other")
    answer = "completion" if "completion" in record else "response"
    return _single_turn(_string(record, "prompt"), _string(record, answer))


def alpaca(record: Record) -> Conversation:
    """`{"instruction": ..., "input": ..., "output": ...}`; a non-empty input follows the instruction after a blank line.

    Raises:
        BadRecordError: a missing instruction or output, or a wrong type.
    """
    question = _string(record, "instruction")
    context = _string(record, "input") if "input" in record else ""
    return _single_turn(f"{question}\n\n{context}" if context else question, _string(record, "output"))


@dataclass(frozen=True, slots=True)
class FormatRule:
    """How a format is recognised and read."""

    convert: Callable[[Record], str | Conversation]
    fits: Callable[[Collection[str]], bool]
    """Whether a record with these keys is of the format."""
    keys: frozenset[str]
    """The keys that are read."""
    stage: Literal["pretrain", "sft"]
    """The stage that can train on it."""


FORMATS: dict[Format, FormatRule] = {
    "text": FormatRule(text, lambda keys: "text" in keys, frozenset({"text"}), "pretrain"),
    "messages": FormatRule(messages, lambda keys: "messages" in keys, frozenset({"messages"}), "sft"),
    "prompt_response": FormatRule(
        prompt_response,
        lambda keys: "prompt" in keys and ("response" in keys or "completion" in keys),
        frozenset({"prompt", "response", "completion"}),
        "sft",
    ),
    "alpaca": FormatRule(
        alpaca,
        lambda keys: "instruction" in keys and "output" in keys,
        frozenset({"instruction", "input", "output"}),
        "sft",
    ),
}


def fitting_formats(keys: Collection[str]) -> list[Format]:
    """The formats a record with these keys can be read in: none, one, or several."""
    return [name for name, rule in FORMATS.items() if rule.fits(keys)]


def _single_turn(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(turn: Any, number: int) -> dict[str, str]:
    name = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRecordError(f'{name} is {_kind(turn)}; it must be {{"role": ..., "content": ...}}')
    unknown = [key for key, value in turn.items() if key not in ("role", "content") and value is not None]
    if unknown:
        # Tool calls, weights, names: dropping them would train on something else than what was written.
        raise BadRecordError(f"{name} has the key `{unknown[0]}`; only `role` and `content` are read, remove it")
    role = _string(turn, "role", name)
    if role not in ROLES:
        raise BadRecordError(f"{name} has the role {role[:40]!r}; write one of {', '.join(ROLES)}")
    return {"role": role, "content": _string(turn, "content", name)}


def _check_roles(roles: list[str]) -> None:
    if "assistant" not in roles:
        raise BadRecordError("no assistant turn, so there is nothing to learn; add one or remove the record")
    first = 1 if roles[0] == "system" else 0
    for index in range(first, len(roles)):
        expected = ("user", "assistant")[(index - first) % 2]
        if roles[index] != expected:
            raise BadRecordError(
                f"message {index + 1} has the role {roles[index]!r} where {expected!r} is expected; "
                "after at most one system message, user and assistant take turns"
            )
    if roles[-1] != "assistant":
        raise BadRecordError("the last message is the user's; end with the assistant's answer, or remove that message")


def _string(record: Record, key: str, owner: str = "") -> str:
    value = _present(record, key, owner)
    name = f"{owner}: `{key}`" if owner else f"`{key}`"
    if not isinstance(value, str):
        raise BadRecordError(f"{name} is {_kind(value)}; it must be text in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name} holds half a surrogate pair ({value[error.start]!a}), which is no character; write the whole pair"
        ) from None
    return value


def _present(record: Record, key: str, owner: str = "") -> Any:
    if key in record:
        return record[key]
    found = ", ".join(f"`{name[:40]}`" for name in list(record)[:8]) or "none"
    raise BadRecordError(f"{owner + ': ' if owner else ''}the key `{key}` is missing (found: {found}); add it")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names[type(value)]
