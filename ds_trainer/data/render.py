"""From a conversation to the text the model sees, and which of its characters, then tokens, are trained.

Where an answer stands is taken from the template, never searched for in the text: a user may quote the assistant word
for word, and an assistant may give the same answer twice.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from ds_trainer.data.formats import BadRecordError, Conversation
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""First position and the one after the last."""

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'assistant:\\n' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ message['role'] + ':\\n' + message['content'] | trim + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a template: roles in plain words, so that no token has to be added to the vocabulary.

Contents are trimmed because most tokenizers join a line break with the white space after it: the first token of an
answer that starts with a space would also belong to the header.
"""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text."""

    text: str
    trained: list[Span]
    """Characters of the assistant's turns; sorted, disjoint."""


def effective_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    """The template in force: the file, else the tokenizer's own, else `DEFAULT_CHAT_TEMPLATE`.

    Args:
        tokenizer: has a `chat_template`, or an end-of-text token for the default one.
        path: `data.chat_template`.

    Raises:
        DataError: the file cannot be read, or there is neither a template nor an end-of-text token.
    """
    if path is not None:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise DataError(
                f"data.chat_template: {path} cannot be read: {reason} ({Path(path).absolute()}). Give the path of a Jinja file."
            ) from None
    if tokenizer.chat_template is not None:
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them called `default`
            raise DataError(f"the tokenizer's chat template: {error} Give one of them as a file: data.chat_template.") from None
    if tokenizer.eos_token is None:
        raise DataError(
            "the tokenizer has neither a chat template nor an end-of-text token, so an answer has no end that could be "
            "learnt. Give a template as a file: data.chat_template=chat.jinja."
        )
    return "{{ bos_token }}" + DEFAULT_CHAT_TEMPLATE if adds_bos(tokenizer) else DEFAULT_CHAT_TEMPLATE


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts every text with its beginning-of-text token."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def render_conversation(conversation: Conversation, template: str, special_tokens: Mapping[str, str]) -> Rendered:
    """Render a conversation and find the characters of its assistant turns.

    A template with `{% generation %}` says itself what is trained. Without it, turn i is what the template adds to the
    messages before it and their generation prompt; that needs a template which does not change earlier text later.

    Args:
        conversation: messages in order, the last one the assistant's.
        template: Jinja source, as `effective_chat_template` gives it.
        special_tokens: `tokenizer.special_tokens_map`; templates use `bos_token` and `eos_token`.

    Raises:
        BadRecordError: the template refuses the conversation, or it cannot be told what the assistant said.
        DataError: the template is no valid Jinja.
    """
    if _GENERATION_TAG.search(template):
        text, spans = _render(conversation, template, special_tokens, track_generation=True)
        return Rendered(text, [span for span in spans if span[0] < span[1]])

    text, _ = _render(conversation, template, special_tokens)
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        before, _ = _render(conversation[:index], template, special_tokens, add_generation_prompt=True)
        through, _ = _render(conversation[: index + 1], template, special_tokens)
        if not (through.startswith(before) and text.startswith(through)):
            raise BadRecordError(
                f"ambiguous mask: the chat template writes the conversation up to message {index + 1} differently when more "
                "follows, so where the answer starts and ends cannot be told. Put {% generation %} ... {% endgeneration %} "
                "around the answer in a copy of the template, and give it as data.chat_template"
            )
        spans.append((len(before), len(through)))
    return Rendered(text, spans)


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
                raise BadRecordError(
                    f"ambiguous mask: one token holds characters on both sides of character {border} of the rendered "
                    "conversation, where a trained part begins or ends. Remove white space at the ends of the answer, or "
                    "put a special token or a line break there in a copy of the template: data.chat_template"
                )
        if first < last:
            spans.append((first, last))
    return spans


def _render(
    conversation: Conversation,
    template: str,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    track_generation: bool = False,
) -> tuple[str, list[Span]]:
    # What tokenizer.apply_chat_template calls, which does not hand out the spans of characters: its own mask of tokens
    # silently includes a token that lies across a border.
    try:
        texts, spans = render_jinja_template(
            conversations=[conversation],
            chat_template=template,
            return_assistant_tokens_mask=track_generation,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}. Correct it.") from None
    except Exception as error:  # a template is a program: it may fail in any way
        raise BadRecordError(
            f"the chat template refuses the conversation ({type(error).__name__}: {error}); change the record, or the "
            "template: data.chat_template"
        ) from None
    return texts[0], spans[0] if track_generation else []
