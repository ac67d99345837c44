"""From one record to what a stage trains on: one pure function a format.

Keys that hold null count as absent where they are optional: Arrow writes nulls into every key that another record has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Literal

from ds_trainer.data.chunks import BadRecordError, Record

Stage = Literal["pretrain", "sft", "reward", "dpo", "orpo", "simpo", "kto"]
"""`train.stage`."""
Records = Literal["pretrain", "sft", "preference", "kto"]
"""What a stage trains on: texts, conversations, pairs of answers, labelled answers."""
Format = Literal["text", "messages", "sharegpt", "prompt_response", "alpaca", "preference", "kto", "tokens"]
Message = dict[str, Any]
"""`role` and `content` (text, empty if the assistant only calls tools), and `tool_calls`, `tool_call_id`, `name` if given.
The arguments of a call are an object: templates want it so."""

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "train")
"""The keys of a message that are read. Any other would be dropped, and something else trained than was written."""


class Reason(StrEnum):
    """Why a record is refused, in words by which refusals are counted."""

    MISSING_KEY = "missing key"
    UNKNOWN_KEY = "unknown key"
    WRONG_TYPE = "wrong type"
    NULL_CONTENT = "null content"
    NOT_TEXT = "content that is not text"
    HALF_PAIR = "half a surrogate pair"
    UNKNOWN_ROLE = "unknown role"
    ROLES_OUT_OF_ORDER = "roles out of order"
    EMPTY_CONVERSATION = "empty conversation"
    NO_ASSISTANT = "no assistant turn"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    TWO_ANSWERS = "two answers"
    EQUAL_ANSWERS = "equal answers"
    OTHER_PROMPT = "an answer to another prompt"
    PROMPT_TOO_LONG = "prompt longer than a row"
    INVALID_TOOL = "invalid tool"
    INVALID_TOOL_CALL = "invalid tool call"
    TOOL_WITHOUT_CALL = "tool result without a call"
    TRAINED_PROMPT = "train on a prompt"
    # What only rendering or tokenising can find.
    TEMPLATE_REFUSES = "template refuses"
    TEMPLATE_DROPS = "template drops a message"
    TEMPLATE_WITHOUT_TOOLS = "template cannot render tools"
    AMBIGUOUS_MASK = "ambiguous mask"
    NOTHING_TRAINED = "nothing is trained"
    CONTROL_TEXT = "text like a control token"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: one system message at most, then user and assistant in turn, tool results after calls."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """What the assistant may call, as JSON schemas; not empty."""
    untrained: frozenset[int] = frozenset()
    """Indices of the messages with `train: false`, and of the answers that belong to the prompt of a pair."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, two endings. Both begin with the prompt, whose answers are untrained."""

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0
    """By how much the chosen one is better, for a reward model; 0 where nobody said."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """One prompt, one ending (the prompt's answers are untrained), and whether it is wanted."""

    conversation: Conversation
    desirable: bool
    num_prompt: int
    """Messages of the prompt; the others are the ending."""

    @property
    def ending(self) -> list[Message]:
        """What is judged."""
        return self.conversation.messages[self.num_prompt :]

    def with_ending(self, ending: list[Message]) -> Conversation:
        """The prompt with another ending."""
        return replace(self.conversation, messages=[*self.conversation.messages[: self.num_prompt], *ending])


def text(record: Record) -> str:
    """`{"text": ...}`: a document to pretrain on.

    Raises:
        BadRecordError: the text is missing or is no text.
    """
    return _string(record, "text")


def messages(record: Record) -> Conversation:
    """`{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`, as OpenAI writes them.

    `developer` is OpenAI's newer word for the system, and read as that. A content may be a list of text parts, which are
    joined; it may be null if the assistant calls tools. `"train": false` leaves an answer out of the loss.

    Raises:
        BadRecordError: a wrong type, an unknown role, or roles out of order.
    """
    return _conversation(_message_list(record, "messages"), _tools(record))


def sharegpt(record: Record) -> Conversation:
    """`{"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}`.

    The value of a `function_call` is JSON: `{"name": ..., "arguments": {...}}`, or a list of those.

    Raises:
        BadRecordError: a wrong type, an unknown role, or roles out of order.
    """
    turns = [_sharegpt_turn(turn, number) for number, turn in enumerate(_list(record, "conversations"), start=1)]
    return _conversation([*_optional_system(record), *turns], _tools(record))


def prompt_response(record: Record) -> Conversation:
    """`{"prompt": ..., "response": ...}`; the answer may also be called `completion`.

    Raises:
        BadRecordError: a missing or doubled answer, or a wrong type.
    """
    has_completion = record.get("completion") is not None
    if has_completion and record.get("response") is not None:
        what = "has both `response` and `completion`; one of them is the answer, remove the other"
        raise BadRecordError(Reason.TWO_ANSWERS, what)
    answer = _string(record, "completion" if has_completion else "response")
    return _conversation([_user(_string(record, "prompt")), _assistant(answer)])


def alpaca(record: Record) -> Conversation:
    """`{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}`.

    A non-empty input follows the instruction after a blank line. The answers of the history are trained too.

    Raises:
        BadRecordError: a missing instruction or output, or a wrong type.
    """
    question = _string(record, "instruction")
    context = _optional_string(record, "input")
    earlier: list[Message] = []
    history = record.get("history")
    for number, pair in enumerate(_list(record, "history") if history else [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            what = f"`history`, entry {number} is {_kind(pair)}; it must be a list of a question and its answer"
            raise BadRecordError(Reason.WRONG_TYPE, what)
        asked = dict(zip(("question", "answer"), pair, strict=True))
        owner = f"`history`, entry {number}"
        earlier += [_user(_string(asked, "question", owner)), _assistant(_string(asked, "answer", owner))]
    last = [_user(f"{question}\n\n{context}" if context else question), _assistant(_string(record, "output"))]
    return _conversation([*_optional_system(record), *earlier, *last])


def preference(record: Record) -> Pair:
    """`{"prompt": ..., "chosen": ..., "rejected": ...}`: each a text or a list of messages; and a `margin`, if any.

    Answers that are lists may repeat the prompt. Without a prompt, the messages that both lists begin with are the prompt.

    Raises:
        BadRecordError: a missing or empty part, equal answers, answers to different prompts, or a margin that is no number.
    """
    chosen, rejected = (_turns(record, key, _assistant) for key in ("chosen", "rejected"))
    if record.get("prompt") is not None or isinstance(record["chosen"], str) or isinstance(record["rejected"], str):
        prompt = prompt_of(record)
        chosen, rejected = _after(prompt, chosen, "chosen"), _after(prompt, rejected, "rejected")
    else:
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if not prompt:
            raise BadRecordError(
                Reason.EMPTY_PROMPT,
                "`chosen` and `rejected` begin with different messages, so there is no prompt; both must begin with it",
            )
    if chosen == rejected:
        what = "`chosen` and `rejected` are equal, so there is nothing to prefer; remove the record"
        raise BadRecordError(Reason.EQUAL_ANSWERS, what)
    margin = record.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)):
        found = _kind(margin) if not isinstance(margin, float) else str(margin)
        raise BadRecordError(Reason.WRONG_TYPE, f"`margin` is {found}; it must be a finite number, such as 0.5, or be left out")
    tools = _tools(record)
    return Pair(
        _answered(prompt, chosen, tools, "chosen"),
        _answered(prompt, rejected, tools, "rejected"),
        float(margin or 0.0),
    )


def kto(record: Record) -> Labelled:
    """`{"prompt": ..., "completion": ..., "label": true | false}`: prompt and completion are texts or lists of messages.

    Raises:
        BadRecordError: a missing or empty part, or a wrong type.
    """
    label = _present(record, "label")
    if not isinstance(label, bool):
        raise BadRecordError(Reason.WRONG_TYPE, f"`label` is {_kind(label)}; it must be true (desirable) or false")
    prompt = prompt_of(record)
    completion = _after(prompt, _turns(record, "completion", _assistant), "completion")
    return Labelled(_answered(prompt, completion, _tools(record), "completion"), label, len(prompt))


def _tokens(record: Record) -> str:
    raise AssertionError("pre-tokenised data is read as arrays, not as records")


@dataclass(frozen=True, slots=True)
class FormatRule:
    """How a format is recognised and read."""

    convert: Callable[[Record], str | Conversation | Pair | Labelled]
    fits: Callable[[Collection[str]], bool]
    """Whether a record with these keys is of the format."""
    keys: frozenset[str]
    """The keys that are read."""
    stage: Records
    """What it holds, by which stages can train on it."""


def _rule(convert: Callable[[Record], Any], stage: Any, needed: str, optional: str = "", either: str = "") -> FormatRule:
    """A rule whose records have all keys of `needed` and one of `either`; keys are parted by spaces."""
    all_of, one_of = frozenset(needed.split()), frozenset(either.split())
    return FormatRule(
        convert,
        lambda keys: bool(all_of) and all_of.issubset(keys) and (not one_of or not one_of.isdisjoint(keys)),
        all_of | one_of | frozenset(optional.split()),
        stage,
    )


FORMATS: dict[Format, FormatRule] = {
    "text": _rule(text, "pretrain", "text"),
    "messages": _rule(messages, "sft", "messages", "tools"),
    "sharegpt": _rule(sharegpt, "sft", "conversations", "system tools"),
    "prompt_response": _rule(prompt_response, "sft", "prompt", either="response completion"),
    "alpaca": _rule(alpaca, "sft", "instruction output", "input system history"),
    "preference": _rule(preference, "preference", "chosen rejected", "prompt tools margin"),
    "kto": _rule(kto, "kto", "prompt completion label", "tools"),
    "tokens": _rule(_tokens, "pretrain", ""),
}


def records_of(stage: Stage) -> Records:
    """What a stage trains on."""
    return stage if stage in ("pretrain", "sft", "kto") else "preference"  # type: ignore[return-value]


def documents_of(stage: Stage) -> int:
    """Documents that a record becomes, which are fed together: a pair is two, chosen and rejected; a labelled answer two, with
    the answer of another record.
    """
    return 2 if records_of(stage) in ("preference", "kto") else 1


def fitting_formats(keys: Collection[str]) -> list[Format]:
    """The formats a record with these keys can be read in: none, one, or several.

    `chosen` and `rejected` together, or `label` beside a prompt and its completion, are written for one purpose: where they
    stand, the other formats are not considered, though pairs often carry `messages` too. Whoever means those states it.
    """
    fitting = [name for name, rule in FORMATS.items() if rule.fits(keys)]
    special: list[Format] = [name for name in fitting if FORMATS[name].stage in ("preference", "kto")]
    return special or fitting


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _conversation(turns: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> Conversation:
    """Check the turns as a whole, and take `train` out of them."""
    _check_roles(turns)
    untrained = set()
    for index, turn in enumerate(turns):
        is_answer = turn["role"] == "assistant"
        if is_answer and not turn["content"].strip() and "tool_calls" not in turn:
            what = f"message {index + 1}, the assistant's, is empty; write the answer, or remove the record"
            raise BadRecordError(Reason.EMPTY_ANSWER, what)
        train = turn.get("train")
        if train is False:
            untrained.add(index)
        elif train and not is_answer:
            what = (
                f"message {index + 1} is the {turn['role']}'s and has `train: true`; only answers can be chosen one by one, "
                "remove it, or write data.train_on=all"
            )
            raise BadRecordError(Reason.TRAINED_PROMPT, what)
    kept = [{key: value for key, value in turn.items() if key != "train"} if "train" in turn else turn for turn in turns]
    return Conversation(kept, tools, frozenset(untrained))


def _check_roles(turns: Sequence[Message]) -> None:
    if not turns:
        raise BadRecordError(Reason.EMPTY_CONVERSATION, "holds no message; write at least a user's and an assistant's")
    if not any(turn["role"] == "assistant" for turn in turns):
        what = "no assistant turn, so there is nothing to learn; add one or remove the record"
        raise BadRecordError(Reason.NO_ASSISTANT, what)
    expected = ["system", "user"]
    calls = 0  # that have no result yet
    ids: set[str] = set()
    for number, turn in enumerate(turns, start=1):
        role = turn["role"]
        if role not in expected:
            if role == "tool":
                what = f"message {number} is a tool's result, but no call before it waits for one; remove it or add the call"
                raise BadRecordError(Reason.TOOL_WITHOUT_CALL, what)
            raise BadRecordError(
                Reason.ROLES_OUT_OF_ORDER,
                f"message {number} has the role {role!r} where {expected[-1]!r} is expected; "
                "after at most one system message, user and assistant take turns, and calls are followed by tool results",
            )
        if role == "assistant":
            made = turn.get("tool_calls", [])
            calls, ids = len(made), {call["id"] for call in made if "id" in call}
            expected = ["tool"] if calls else ["user"]
        elif role == "tool":
            answered = turn.get("tool_call_id")
            if answered is not None and ids and answered not in ids:
                what = f"message {number} answers the call {answered[:40]!r}, which waits for no result; correct `tool_call_id`"
                raise BadRecordError(Reason.TOOL_WITHOUT_CALL, what)
            ids.discard(answered or "")
            calls -= 1
            expected = ["tool", "assistant"] if calls else ["assistant"]
        else:
            expected = ["user"] if role == "system" else ["assistant"]
    if turns[-1]["role"] != "assistant":
        what = f"the last message is the {turns[-1]['role']}'s; end with the assistant's answer, or remove that message"
        raise BadRecordError(Reason.ROLES_OUT_OF_ORDER, what)


def _message_list(record: Record, key: str) -> list[Message]:
    return [_message(turn, number) for number, turn in enumerate(_list(record, key), start=1)]


def _message(turn: Any, number: int) -> Message:
    owner = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRecordError(Reason.WRONG_TYPE, f'{owner} is {_kind(turn)}; it must be {{"role": ..., "content": ...}}')
    _refuse_unknown(turn, MESSAGE_KEYS, owner)
    role = _string(turn, "role", owner)
    if role == "developer":
        role = "system"
    if role not in ROLES:
        what = f"{owner} has the role {role[:40]!r}; write one of {', '.join(ROLES)}"
        raise BadRecordError(Reason.UNKNOWN_ROLE, what)
    calls = _tool_calls(turn["tool_calls"], owner) if turn.get("tool_calls") else []
    if calls and role != "assistant":
        raise BadRecordError(
            Reason.INVALID_TOOL_CALL, f"{owner} is the {role}'s and has `tool_calls`; only the assistant calls"
        )
    message: Message = {"role": role, "content": "" if calls and turn.get("content") is None else _content(turn, owner)}
    if calls:
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            message[key] = _string(turn, key, owner)
    return message | _train(turn, owner)


def _sharegpt_turn(turn: Any, number: int) -> Message:
    owner = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRecordError(Reason.WRONG_TYPE, f'{owner} is {_kind(turn)}; it must be {{"from": ..., "value": ...}}')
    _refuse_unknown(turn, ("from", "value", "train"), owner)
    writer, value = _string(turn, "from", owner), _string(turn, "value", owner)
    role = _SHAREGPT_ROLES.get(writer)
    if role is None:
        what = f"{owner} is from {writer[:40]!r}; write one of {', '.join(_SHAREGPT_ROLES)}"
        raise BadRecordError(Reason.UNKNOWN_ROLE, what)
    if writer != "function_call":
        return {"role": role, "content": value} | _train(turn, owner)
    made = _parsed(value, owner, Reason.INVALID_TOOL_CALL)
    calls = [{"function": call} for call in (made if isinstance(made, list) else [made])]
    return {"role": role, "content": "", "tool_calls": _tool_calls(calls, owner)} | _train(turn, owner)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def _train(turn: Mapping[str, Any], owner: str) -> Message:
    train = turn.get("train")
    if train is None:
        return {}
    if not isinstance(train, bool):
        raise BadRecordError(Reason.WRONG_TYPE, f"{owner}: `train` is {_kind(train)}; it must be true or false")
    return {"train": train}


def _content(turn: Mapping[str, Any], owner: str) -> str:
    """The content of a message: a text, or parts that are texts."""
    if not isinstance(turn.get("content"), list):
        return _string(turn, "content", owner)
    parts = []
    for number, part in enumerate(turn["content"], start=1):
        name = f"{owner}, part {number}"
        if not isinstance(part, dict):
            raise BadRecordError(Reason.WRONG_TYPE, f'{name} is {_kind(part)}; it must be {{"type": "text", "text": ...}}')
        if part.get("type") != "text":
            what = f"{name} is of the type {str(part.get('type'))[:40]!r}; only parts of the type 'text' can be trained on"
            raise BadRecordError(Reason.NOT_TEXT, what)
        _refuse_unknown(part, ("type", "text"), name)
        parts.append(_string(part, "text", name))
    return "".join(parts)


def _tool_calls(calls: Any, owner: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRecordError(Reason.WRONG_TYPE, f"{owner}: `tool_calls` is {_kind(calls)}; it must be a list")
    return [_tool_call(call, f"{owner}, call {number}") for number, call in enumerate(calls, start=1)]


def _tool_call(call: Any, owner: str) -> dict[str, Any]:
    rule = 'it must be {"type": "function", "function": {"name": ..., "arguments": {...}}}'
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type") not in (None, "function"):
        raise BadRecordError(Reason.INVALID_TOOL_CALL, f"{owner} is no call of a function; {rule}")
    _refuse_unknown(call, ("id", "type", "function", "index"), owner)
    _refuse_unknown(function, ("name", "arguments"), owner)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{owner}: `arguments`", Reason.INVALID_TOOL_CALL)
    if not isinstance(arguments, dict):
        what = f"{owner}: `arguments` is {_kind(arguments)}; it must be an object, or the JSON text of one"
        raise BadRecordError(Reason.INVALID_TOOL_CALL, what)
    _check_json(arguments, f"{owner}: `arguments`")
    named = {"id": _string(call, "id", owner)} if call.get("id") is not None else {}
    return named | {"type": "function", "function": {"name": _string(function, "name", owner), "arguments": arguments}}


def _tools(record: Record) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "`tools`", Reason.INVALID_TOOL) if tools.strip() else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise BadRecordError(Reason.INVALID_TOOL, f"`tools` is {_kind(tools)}; it must be a list, or the JSON text of one")
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or not isinstance(tool_name(tool), str):
            what = f'tool {number} has no name; it must be {{"type": "function", "function": {{"name": ..., ...}}}}'
            raise BadRecordError(Reason.INVALID_TOOL, what)
    _check_json(tools, "`tools`")
    return tools


def tool_name(tool: Mapping[str, Any]) -> Any:
    """The name of a tool, whether its schema stands inside `function` or not."""
    function = tool.get("function")
    return (function if isinstance(function, dict) else tool).get("name")


def _turns(record: Record, key: str, speaker: Callable[[str], Message]) -> list[Message]:
    """A text as one message of the speaker's, or the list of messages that stands there."""
    value = _present(record, key)
    return _message_list(record, key) if isinstance(value, list) else [speaker(_string(record, key))]


def prompt_of(record: Record) -> list[Message]:
    """The messages of `prompt`, a text or a list of messages.

    Raises:
        BadRecordError: it is missing, empty or of a wrong type.
    """
    prompt = _turns(record, "prompt", _user)
    if not any(message["content"].strip() for message in prompt):
        raise BadRecordError(Reason.EMPTY_PROMPT, "`prompt` is empty; write what is answered, or remove the record")
    return prompt


def _after(prompt: list[Message], answer: list[Message], key: str) -> list[Message]:
    """The answer without the prompt, which it may repeat."""
    if answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    if answer and answer[0]["role"] != "assistant":
        what = f"`{key}` begins with the {answer[0]['role']}'s message, which is not that of `prompt`; make them agree"
        raise BadRecordError(Reason.OTHER_PROMPT, what)
    return answer


def _answered(prompt: list[Message], answer: list[Message], tools: list[dict[str, Any]] | None, key: str) -> Conversation:
    if not answer:
        raise BadRecordError(Reason.EMPTY_ANSWER, f"`{key}` is empty; write the answer, or remove the record")
    if answer[0]["role"] != "assistant":
        what = f"`{key}` leaves the prompt with the {answer[0]['role']}'s message; only what the assistant says may differ"
        raise BadRecordError(Reason.OTHER_PROMPT, what)
    conversation = _conversation([*prompt, *answer], tools)
    return replace(conversation, untrained=conversation.untrained.union(range(len(prompt))))


def _optional_system(record: Record) -> list[Message]:
    system = _optional_string(record, "system")
    return [{"role": "system", "content": system}] if system else []


def _refuse_unknown(found: Mapping[str, Any], known: Collection[str], owner: str) -> None:
    for key, value in found.items():
        if key not in known and value is not None:
            read = ", ".join(f"`{name}`" for name in known)
            raise BadRecordError(Reason.UNKNOWN_KEY, f"{owner} has the key `{key[:40]}`; only {read} are read, remove it")


def _list(record: Record, key: str) -> list[Any]:
    value = _present(record, key)
    if value == []:
        raise BadRecordError(Reason.EMPTY_CONVERSATION, f"`{key}` is an empty list; write messages, or remove the record")
    if not isinstance(value, list):
        reason = Reason.NULL_CONTENT if value is None else Reason.WRONG_TYPE
        raise BadRecordError(reason, f"`{key}` is {_kind(value)}; it must be a list")
    return value


def _optional_string(record: Record, key: str) -> str:
    return "" if record.get(key) is None else _string(record, key)


def _string(record: Record, key: str, owner: str = "") -> str:
    value = _present(record, key, owner)
    name = f"{owner}: `{key}`" if owner else f"`{key}`"
    if not isinstance(value, str):
        reason = Reason.NULL_CONTENT if value is None else Reason.WRONG_TYPE
        raise BadRecordError(reason, f"{name} is {_kind(value)}; it must be text in quotes")
    _check_pairs(value, name)
    return value


def _check_pairs(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"{name} holds half a surrogate pair ({value[error.start]!a}), which is no character; write the whole pair"
        raise BadRecordError(Reason.HALF_PAIR, what) from None


def _check_json(value: Any, name: str) -> None:
    """Refuse what a template could not write as JSON, such as a date or bytes out of a Parquet file."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRecordError(Reason.WRONG_TYPE, f"{name} cannot be written as JSON ({error}); use plain values") from None
    _check_pairs(written, name)


def _parsed(value: str, name: str, reason: Reason) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRecordError(reason, f"{name} is text that is not valid JSON ({error}); correct it") from None


def _present(record: Record, key: str, owner: str = "") -> Any:
    if key in record:
        return record[key]
    names = [str(name)[:40] for name in record]
    found = ", ".join(f"`{name}`" for name in names[:8]) or "none"
    fix = f"add it, or name the key that holds it in the source: `fields: {{{key}: ...}}`" if not owner else "add it"
    if not owner and (close := get_close_matches(key, names, n=1)):
        fix = f"did you mean `{close[0]}`? Then write it in the source: `fields: {{{key}: {close[0]}}}`"
    what = f"{owner + ': ' if owner else ''}the key `{key}` is missing (found: {found}); {fix}"
    raise BadRecordError(Reason.MISSING_KEY, what)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), f"of the type {type(value).__name__}")
