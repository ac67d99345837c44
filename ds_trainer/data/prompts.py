"""The prompts that a run completes for people to read: from a file of records to token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_trainer.data.chunks import BadRecordError
from ds_trainer.data.formats import Message, prompt_of
from ds_trainer.data.render import adds_bos, render_prompt
from ds_trainer.data.tokenize import backend_json, control_tokens
from ds_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked to go on from."""

    line: int
    """In its file."""
    text: str
    """As the model sees it, with what the chat template writes."""
    ids: tuple[int, ...]


def read_prompts(
    path: str, tokenizer: PreTrainedTokenizerBase, *, template: str | None, limit: int, room: int
) -> tuple[Prompt, ...]:
    """Read the first prompts of a file of JSON lines, `{"prompt": ...}`: a text or a list of messages.

    Args:
        path: of the file.
        tokenizer: a fast one.
        template: Jinja source; None takes the prompt, a text then, as it stands.
        limit: how many are read at most.
        room: tokens a prompt may have.

    Raises:
        DataError: no such file, no record in it, or a record that cannot be completed: with path and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(
            f"evaluate.generate.prompts: {path} cannot be read: {reason} ({Path(path).absolute()}). Give a file of lines like "
            '{"prompt": "What is two plus two?"}.'
        ) from None
    control = control_tokens(json.loads(backend_json(tokenizer)))
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or len(prompts) == limit:
            continue
        try:
            messages = _messages(_record(line), template)
            if control is not None and any(control.pattern.search(each["content"]) for each in messages):
                raise BadRecordError("", "holds the text of a control token; remove it")
            text = messages[0]["content"]
            if template is not None:
                text = render_prompt(messages, template, tokenizer.special_tokens_map)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if template is None and adds_bos(tokenizer):
                ids = [tokenizer.bos_token_id, *ids]
            if not 0 < len(ids) <= room:
                raise BadRecordError("", f"has {len(ids):,} tokens, and there is room for 1 to {room:,}; shorten it")
        except BadRecordError as error:
            raise DataError(f"evaluate.generate.prompts: {path}:{number}: {error}.") from None
        prompts.append(Prompt(number, text, tuple(ids)))
    if not prompts:
        raise DataError(f'evaluate.generate.prompts: {path} has no record. Write lines like {{"prompt": "..."}}.')
    return tuple(prompts)


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BadRecordError("", f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadRecordError("", 'must be an object like {"prompt": "..."}')
    return record


def _messages(record: dict[str, Any], template: str | None) -> list[Message]:
    if template is None and not isinstance(record.get("prompt"), str):
        raise BadRecordError("", "`prompt` must be a text where train.stage = pretrain")
    return prompt_of(record)
