"""From a conversation to the text the model sees, and which of its characters, then tokens, are trained.

Where an answer stands is taken from the template, never searched for in the text: a user may quote the assistant word
for word, and an assistant may give the same answer twice. Nor may a user quote a control token: what a content says stays
text, and only the template writes control tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from ds_trainer.data.chunks import BadRecordError
from ds_trainer.data.formats import Conversation, Message, Reason, tool_name
from ds_trainer.data.templates import CONTROL_TOKENS, TEMPLATES
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First position and the one after the last."""
TrainOn = Literal["assistant", "last_assistant", "all"]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WRITTEN, _QUOTED = 0xFFFFD, 0x10FFFD
"""The private characters that stand for control tokens of the template's, and for the same words in a content: from these
downwards. Icon fonts use the low end of the same planes."""


class ControlTokens:
    """Keeps the words of control tokens in contents apart from the control tokens that a template writes.

    Each is replaced by as many private characters as it has, so that all positions stay: the contents' before rendering,
    which are put back afterwards, and between the two the template's, which the tokenizer then knows under that name.
    """

    def __init__(self, texts: Sequence[str], *, always: bool = False) -> None:
        """Take the special tokens of a tokenizer.

        Args:
            texts: special tokens, at least one, none empty.
            always: rename also where no content holds such a word, for tokenizers that change text before they split it.
        """
        self._quoted = {text: chr(_QUOTED - index) * len(text) for index, text in enumerate(texts)}
        self._texts = tuple(texts)
        self.written = {text: chr(_WRITTEN - index) * len(text) for index, text in enumerate(texts)}
        """The name each token has in a rendered text that is `renamed`."""
        self.always = always
        quoted = f"{chr(_QUOTED + 1 - len(texts))}-{chr(_QUOTED)}"
        self._private = re.compile(f"[{quoted}{chr(_WRITTEN + 1 - len(texts))}-{chr(_WRITTEN)}]")
        self._quoted_run = re.compile(f"([{quoted}])\\1*")
        longest_first = sorted(texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))
        """Finds the text of any of the tokens."""

    def hide(self, value: Any) -> Any:
        """Put private characters in place of the words, in all strings of a JSON value.

        Raises:
            BadRecordError: a string holds private characters of those that are used here.
        """
        if isinstance(value, str):
            if found := self._private.search(value):
                raise BadRecordError(
                    Reason.CONTROL_TEXT,
                    f"holds the text of a control token, and the private character U+{ord(found[0]):X}, which is needed to "
                    "keep such text apart from control tokens; remove one of them",
                )
            return self.pattern.sub(lambda found: self._quoted[found[0]], value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def rename(self, rendered: str) -> str:
        """Rename the control tokens of a text rendered from what `hide` gave, and put the hidden words back."""
        renamed = self.pattern.sub(lambda found: self.written[found[0]], rendered)
        return self._quoted_run.sub(self._unhide, renamed)

    def _unhide(self, run: re.Match[str]) -> str:
        text = self._texts[_QUOTED - ord(run[1])]
        times, rest = divmod(len(run[0]), len(text))
        if rest:
            raise BadRecordError(
                Reason.CONTROL_TEXT,
                f"holds the text {text!r} like a control token's, and the template cuts it in two; remove it",
            )
        return text * times


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text."""

    text: str
    trained: list[Span]
    """Characters that are trained; sorted, disjoint, not empty."""
    quotes_control: bool = False
    """Whether a content holds the text of a control token."""
    renamed: bool = False
    """Whether the control tokens have the names of `ControlTokens.written`."""


def effective_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_path: str | None) -> str:
    """The template in force: the one that is asked for, else the tokenizer's own, else `plain`.

    A built-in one begins with the beginning-of-text token if the tokenizer puts one before every text.

    Args:
        tokenizer: has a `chat_template`, or an end-of-text token for `plain`.
        name_or_path: `data.chat_template`, the name of a built-in template or the path of a file.

    Raises:
        DataError: the file cannot be read, the tokenizer lacks a token that the template needs, or there is neither a
            template nor an end-of-text token.
    """
    if name_or_path in TEMPLATES:
        return _built_in(tokenizer, name_or_path)
    if name_or_path is not None:
        try:
            return Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(
                f"data.chat_template: {name_or_path} cannot be read: {reason} ({Path(name_or_path).absolute()}). Give the path "
                f"of a Jinja file, or the name of a built-in template: {', '.join(TEMPLATES)}."
            ) from None
    if tokenizer.chat_template is None:
        return _built_in(tokenizer, "plain")
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # several named templates, none of them called `default`
        raise DataError(f"the tokenizer's chat template: {error} Give one of them as a file: data.chat_template.") from None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts every text with its beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def render_conversation(
    conversation: Conversation,
    template: str,
    special_tokens: Mapping[str, str],
    *,
    train_on: TrainOn = "assistant",
    control: ControlTokens | None = None,
) -> Rendered:
    """Render a conversation and find the characters that are trained.

    A template with `{% generation %}` says itself where the answers stand. Without it, answer i is what the template adds to
    the messages before it and their generation prompt; that needs a template which does not change earlier text later.

    Args:
        conversation: the last message is the assistant's.
        template: Jinja source, as `effective_chat_template` gives it.
        special_tokens: `tokenizer.special_tokens_map`; templates use `bos_token` and `eos_token`.
        train_on: `data.train_on`; `all` is the whole text.
        control: keeps contents from writing control tokens; None if there are none.

    Raises:
        BadRecordError: the template refuses the conversation or drops a part of it, it cannot be told what the assistant
            said, or nothing is trained.
        DataError: the template is no valid Jinja.
    """
    messages, tools = conversation.messages, conversation.tools
    quotes = control is not None and _holds((messages, tools), control.pattern)
    renames = control is not None and (quotes or control.always)
    if control is not None and renames:
        messages, tools = control.hide(messages), control.hide(tools)

    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = _wanted(conversation, answers, train_on)
    tracked = _GENERATION_TAG.search(template) is not None
    text, spans = _render(messages, tools, template, special_tokens, track_generation=tracked)
    if not tracked:
        turns = _turns_by_prefix(messages, tools, template, special_tokens, text, wanted)
    elif len(spans) == len(answers):
        turns = dict(zip(answers, spans, strict=True))
    else:
        raise BadRecordError(
            Reason.AMBIGUOUS_MASK,
            f"ambiguous mask: the chat template writes {len(spans)} generation blocks for {len(answers)} answers; put one "
            "{% generation %} ... {% endgeneration %} around each answer in a copy of the template, and give it as "
            "data.chat_template",
        )
    if control is not None and renames:
        text = control.rename(text)
    _check_nothing_dropped(conversation, text, turns)

    trained = [turns[index] for index in wanted]
    if train_on == "all":
        borders = [0, *(border for span in trained for border in span), len(text)]
        trained = list(zip(borders[::2], borders[1::2], strict=True))
    trained = [span for span in trained if span[0] < span[1]]
    if not trained:
        what = "nothing is trained: the answers have `train: false` or render to nothing; change that or remove the record"
        raise BadRecordError(Reason.NOTHING_TRAINED, what)
    return Rendered(text, trained, quotes_control=quotes, renamed=renames)


def render_prompt(messages: list[Message], template: str, special_tokens: Mapping[str, str]) -> str:
    """What an answer is to follow: messages and the template's generation prompt.

    Raises:
        BadRecordError: the template refuses the messages.
    """
    return _render(messages, None, template, special_tokens, add_generation_prompt=True)[0]


def trained_tokens(offsets: Sequence[Span], trained: Sequence[Span]) -> list[Span]:
    """Turn spans of characters into spans of tokens.

    Args:
        offsets: first character and the one after the last of each token, in order, white space included.
        trained: spans of characters, sorted and disjoint.

    Returns:
        Spans of token positions, without empty ones.

    Raises:
        BadRecordError: a token lies across the border of a span, so it is neither trained nor not.
    """
    spans = []
    for start, end in trained:
        first, last = bisect_left(offsets, (start, 0)), bisect_left(offsets, (end, 0))
        for border, before in ((start, first), (end, last)):
            if before and offsets[before - 1][1] > border:
                raise across_border(border)
        if first < last:
            spans.append((first, last))
    return spans


def _built_in(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    missing = [token for token in CONTROL_TOKENS[name] if len(tokenizer.encode(token, add_special_tokens=False)) != 1]
    if missing:
        raise DataError(
            f"data.chat_template: {name} needs {' and '.join(missing)}, which the tokenizer does not have as single tokens, so "
            "they would be read as plain text. Use data.chat_template=plain, or a tokenizer that has them."
        )
    if name == "plain" and tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so in the template `plain` an answer has no end that could be learnt. "
            "Give another one, by name or as a file: data.chat_template=chat.jinja."
        )
    return "{{ bos_token }}" + TEMPLATES[name] if adds_bos(tokenizer) else TEMPLATES[name]


def across_border(character: int) -> BadRecordError:
    """What to say when a token holds characters on both sides of a border."""
    return BadRecordError(
        Reason.AMBIGUOUS_MASK,
        f"ambiguous mask: one token holds characters on both sides of character {character} of the rendered conversation, "
        "where a trained part begins or ends. Remove white space at the ends of the answer, or put a special token or a line "
        "break there in a copy of the template: data.chat_template",
    )


def _wanted(conversation: Conversation, answers: Sequence[int], train_on: TrainOn) -> list[int]:
    """The answers whose place must be known: what is trained, or with `all` what is not."""
    if train_on == "all":
        if others := conversation.untrained.difference(answers):
            raise BadRecordError(
                Reason.AMBIGUOUS_MASK,
                f"ambiguous mask: message {min(others) + 1} has `train: false`, but only an answer can be left out where "
                "data.train_on=all; remove it",
            )
        return sorted(conversation.untrained)
    kept = answers[-1:] if train_on == "last_assistant" else answers
    return [index for index in kept if index not in conversation.untrained]


def _turns_by_prefix(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    template: str,
    special_tokens: Mapping[str, str],
    text: str,
    wanted: Collection[int],
) -> dict[int, Span]:
    turns = {}
    for index in wanted:
        before, _ = _render(messages[:index], tools, template, special_tokens, add_generation_prompt=True)
        through = text
        if index + 1 < len(messages):
            through, _ = _render(messages[: index + 1], tools, template, special_tokens)
        if not (through.startswith(before) and text.startswith(through)):
            last = index + 1 == len(messages)
            raise BadRecordError(
                Reason.AMBIGUOUS_MASK,
                f"ambiguous mask: the chat template writes what stands {'before' if last else 'up to'} message {index + 1} "
                "differently when more follows, so where the answer starts and ends cannot be told. Put {% generation %} ... "
                "{% endgeneration %} around the answer in a copy of the template and give it as data.chat_template"
                + ("" if last else "; or train on the last answer only: data.train_on=last_assistant"),
            )
        turns[index] = (len(before), len(through))
    return turns


def _check_nothing_dropped(conversation: Conversation, text: str, turns: Mapping[int, Span]) -> None:
    """Refuse what a template leaves out in silence. Only thoughts of earlier answers may be missing: many cut those."""
    for index, message in enumerate(conversation.messages):
        content, start, end = message["content"].strip(), *turns.get(index, (0, len(text)))
        if message["role"] == "assistant":
            for call in message.get("tool_calls", ()):
                if text.find(call["function"]["name"], start, end) < 0:
                    raise _without_tools(f"the call in message {index + 1}")
            content = content.rpartition("</think>")[2].strip()
        # Some templates write a result as a JSON string.
        if text.find(content, start, end) < 0 and text.find(json.dumps(content, ensure_ascii=False)[1:-1], start, end) < 0:
            if message["role"] == "tool":
                raise _without_tools(f"message {index + 1}, a tool's result")
            raise BadRecordError(
                Reason.TEMPLATE_DROPS,
                f"the chat template does not write the content of message {index + 1}, the {message['role']}'s, as it stands; "
                "change the template (data.chat_template), or remove that message",
            )
    for tool in conversation.tools or ():
        if tool_name(tool) not in text:
            raise _without_tools(f"the tool {tool_name(tool)[:40]!r}")


def _without_tools(what: str) -> BadRecordError:
    return BadRecordError(
        Reason.TEMPLATE_WITHOUT_TOOLS,
        f"the chat template does not write {what}; give one that does (data.chat_template, the built-in ones do), or remove it",
    )


def _holds(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a string of a JSON value has a match."""
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_holds(key, pattern) or _holds(item, pattern) for key, item in value.items())
    return any(_holds(item, pattern) for item in value) if isinstance(value, list | tuple) else False


def _render(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    template: str,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    track_generation: bool = False,
) -> tuple[str, list[Span]]:
    # What tokenizer.apply_chat_template calls, which does not hand out the spans of characters: its own mask of tokens
    # silently includes a token that lies across a border. Imported here: workers that tokenise texts start without it.
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=track_generation,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message.rstrip('.')}. Correct it."
        ) from None
    except Exception as error:  # a template is a program: it may fail in any way
        raise BadRecordError(
            Reason.TEMPLATE_REFUSES,
            f"the chat template refuses the conversation ({type(error).__name__}: {error}); change the record, or the "
            "template: data.chat_template",
        ) from None
    return texts[0], spans[0] if track_generation else []
