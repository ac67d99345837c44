"""From samples to token ids, in batches, so that the tokenizer can use all cores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tokenizers import Tokenizer

from ds_trainer.data.formats import BadRecordError
from ds_trainer.data.render import Rendered, Span, adds_bos, render_conversation, trained_tokens
from ds_trainer.data.sources import Problems, Report, Sample
from ds_trainer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")

BATCH_SAMPLES = 1024
BATCH_CHARACTERS = 4 * 1024 * 1024
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Document:
    """The tokens of one sample."""

    ids: list[int]
    trained: list[Span]
    """Token positions that are trained; sorted, disjoint, not empty."""


def backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides how the tokenizer splits plain text.

    Left out are truncation and padding, which any earlier call may have switched on, and the post-processor: it only adds
    special tokens, which a template writes itself, and cuts white space off the offsets, which would hide a token that
    belongs half to the header and half to the answer.

    Raises:
        ModelError: the tokenizer is not one of the `tokenizers` library.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not say where in the text a token stands. "
            "Give a fast one, with a tokenizer.json: model.tokenizer."
        )
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(parts | {"truncation": None, "padding": None, "post_processor": None})


def tokenize_texts(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, report: Report) -> Iterator[Document]:
    """Tokenise documents to pretrain on: all tokens are trained.

    A document starts with the beginning-of-text token if the tokenizer puts one, and ends with the end-of-text token if
    there is one. An empty text stays empty.

    Raises:
        ModelError: the tokenizer is a slow one.
    """
    backend = Tokenizer.from_str(backend_json(tokenizer))
    start = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if not end:
        report("the tokenizer has no end-of-text token: documents end without one")
    progress = _Progress(report)
    for batch in _batches((_text(sample) for sample in samples), size=len):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            ids = [*start, *encoding.ids, *end] if encoding.ids else []
            yield Document(ids, [(0, len(ids))] if ids else [])
            progress.add(len(ids))


def tokenize_conversations(
    samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, template: str, problems: Problems, report: Report
) -> Iterator[Document]:
    """Tokenise conversations: the assistant's tokens are trained. What cannot be masked goes to `problems`.

    Raises:
        DataError: `problems` is full, or the template is no valid Jinja.
        ModelError: the tokenizer is a slow one.
    """
    backend = Tokenizer.from_str(backend_json(tokenizer))
    rendered = _rendered(samples, template, tokenizer.special_tokens_map, problems)
    progress = _Progress(report)
    for batch in _batches(rendered, size=lambda item: len(item[1].text)):
        encodings = backend.encode_batch([item.text for _, item in batch], add_special_tokens=False)
        for (where, item), encoding in zip(batch, encodings, strict=True):
            try:
                trained = trained_tokens(encoding.offsets, item.trained)
            except BadRecordError as error:
                problems.add(where, f"{error}.")
                continue
            yield Document(encoding.ids, trained)
            progress.add(len(encoding.ids))


def _text(sample: Sample) -> str:
    assert isinstance(sample.content, str)
    return sample.content


def _rendered(
    samples: Iterable[Sample], template: str, special_tokens: Mapping[str, str], problems: Problems
) -> Iterator[tuple[str, Rendered]]:
    for sample in samples:
        assert not isinstance(sample.content, str)
        try:
            yield sample.where, render_conversation(sample.content, template, special_tokens)
        except BadRecordError as error:
            problems.add(sample.where, f"{error}.")


def _batches(items: Iterable[Item], *, size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists of items, bounded in number and in characters, so that memory is bounded and all cores are busy."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if len(batch) == BATCH_SAMPLES or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Progress:
    """Reports the speed every few seconds."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._started = self._reported = time.monotonic()
        self._samples = self._tokens = 0

    def add(self, num_tokens: int) -> None:
        """Count one sample."""
        self._samples += 1
        self._tokens += num_tokens
        now = time.monotonic()
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            seconds = now - self._started
            self._report(
                f"tokenising: {self._samples:,} records, {self._tokens:,} tokens "
                f"({self._samples / seconds:,.0f} records/s, {self._tokens / seconds:,.0f} tokens/s)"
            )
