"""From a chunk of records to its tokens, and the recipe by which any process does that alike."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from ds_trainer.data.chunks import MARGIN_COUNT, BadRecord, BadRecordError, Chunk, TokenizedChunk
from ds_trainer.data.formats import FORMATS, Conversation, Format, Labelled, Pair, Reason, Stage, records_of
from ds_trainer.data.readers import parse_chunk
from ds_trainer.data.render import (
    ControlTokens,
    Rendered,
    Span,
    TrainOn,
    across_border,
    adds_bos,
    render_conversation,
    trained_tokens,
)
from ds_trainer.data.sources import rename
from ds_trainer.errors import DataError, ModelError
from ds_trainer.protocols import OTHERS, UNUSED, UNWANTED, WANTED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Backend = dict[str, Any]
"""A tokenizer as the `tokenizers` library writes it."""
Item = TypeVar("Item")
_Spanned = tuple[NDArray[np.int32], list[Span]]

LARGEST_UINT16 = 65_500
"""Tokenizers with fewer ids than this are stored in 16 bits; the same limit as Megatron's, whose files we read."""
BATCH = 64
"""Texts encoded at a time: what an encoding takes beside its ids is a hundred times as large, so few should live at once."""
CACHED_WORDS = 200_000
"""Words whose tokens a BPE remembers; its own 10,000 are soon full, and then nothing new is kept."""
_NEIGHBOURS = 100
"""Records that are looked at for another answer."""
CONTROL_COUNT = "records with text like a control token"
EMPTY_COUNT = "empty texts"

_KEEPS_TEXT = frozenset({"NFC", "NFD", "Prepend", "Replace", "Strip"})
"""Normalizers that cannot make the text of a control token out of other characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides which tokens a record becomes. Picklable; says nothing about files."""

    format: Format
    stage: Literal["pretrain", "sft", "preference", "reward", "kto"]
    """What a record becomes: a text, a conversation, or two, of which the answers or only the last token are targets."""
    fields: Mapping[str, str]
    """The format's key -> the record's, as in `Source.fields`."""
    backend: str
    """The tokenizer, as `backend_json` gives it."""
    special_tokens: Mapping[str, Any]
    """What templates see: `tokenizer.special_tokens_map`."""
    bos: int | None
    """Put before every text; a template writes its own."""
    eos: int | None
    """Put after every text; None if the tokenizer has no end-of-text token."""
    template: str | None
    """Jinja source; None for texts."""
    train_on: TrainOn
    dtype: Literal["uint16", "int32"]
    """Holds every id of the tokenizer."""
    row_tokens: int | None = None
    """Of pairs: `data.seq_len`, which a prompt must not fill."""
    pad: int | None = None
    """Of `reward`: what a model with a value head takes for padding; None if the tokenizer has none."""

    def fingerprint_parts(self) -> dict[str, Any]:
        """Everything as JSON, the tokenizer by its hash: equal parts and equal records give equal tokens."""
        parts = asdict(self)
        for name in ("row_tokens", "pad"):  # so that the caches of texts and conversations keep their names
            if parts[name] is None:
                del parts[name]
        return parts | {"backend": hashlib.sha256(self.backend.encode()).hexdigest()}


def make_recipe(
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: Format,
    fields: Mapping[str, str],
    stage: Stage,
    template: str | None,
    train_on: TrainOn = "assistant",
    seq_len: int | None = None,
) -> Recipe:
    """Decide how the records of a source become tokens.

    Args:
        tokenizer: a fast tokenizer, already loaded.
        format: how records are read; one that the stage can train on.
        fields: `Source.fields`.
        stage: `train.stage`.
        template: as `effective_chat_template` gives it; None for `pretrain`.
        train_on: `data.train_on`; texts are always trained whole.
        seq_len: `data.seq_len`; it matters for pairs only.

    Raises:
        DataError: the format belongs to another stage, or the template is no valid Jinja.
        ModelError: the tokenizer is a slow one.
    """
    needed, records = FORMATS[format].stage, records_of(stage)
    if needed != records:
        raise DataError(f"format {format} is for train.stage={needed}, not {stage}. Change one of them.")
    recipe = Recipe(
        format=format,
        stage=stage if stage in ("pretrain", "sft", "reward", "kto") else "preference",  # type: ignore[arg-type]
        fields=dict(fields),
        backend=backend_json(tokenizer),
        special_tokens=dict(tokenizer.special_tokens_map),
        bos=tokenizer.bos_token_id if adds_bos(tokenizer) else None,
        eos=tokenizer.eos_token_id,
        template=None if stage == "pretrain" else template,
        train_on=train_on,
        dtype="uint16" if max(tokenizer.get_vocab().values(), default=0) < LARGEST_UINT16 else "int32",
        row_tokens=seq_len if records in ("preference", "kto") else None,
        pad=tokenizer.pad_token_id if stage == "reward" else None,
    )
    if recipe.template is not None:
        trial = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        with suppress(BadRecordError):  # the real conversations may be others
            render_conversation(trial, recipe.template, recipe.special_tokens)
    return recipe


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


def control_tokens(backend: Backend) -> ControlTokens | None:
    """The special tokens of a tokenizer, which no content may write; None if it has none."""
    texts = [token["content"] for token in backend["added_tokens"] if token["special"] and token["content"]]
    return ControlTokens(texts, always=not _normalizers(backend["normalizer"]) <= _KEEPS_TEXT) if texts else None


def renamed_backend(backend: Backend, names: Mapping[str, str]) -> Backend:
    """The tokenizer with other names for its special tokens, ids unchanged; plain text cannot reach their ids in any way.

    Args:
        backend: the object `backend_json` writes.
        names: special token -> its new name, such as `ControlTokens.written`.
    """
    model = dict(backend["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [merge for merge, pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]
    added = [
        token | {"content": names.get(token["content"], token["content"])} if token["special"] else token
        for token in backend["added_tokens"]
    ]
    return backend | {"model": model, "added_tokens": added}


def byte_lengths(backend: Backend) -> NDArray[np.int32] | None:
    """Bytes of UTF-8 each token stands for, by id; None if tokens do not simply cut the bytes of a text into pieces.

    They do in byte-level BPE, which GPT-2, Llama 3 and Qwen have. Where its tokens stand then follows from their ids, and the
    library need not keep track of it, which takes a quarter of its time.
    """
    model, splitter = backend["model"], backend["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or not _normalizers(backend["normalizer"]) <= {"NFC"}
        or steps[-1].get("type") != "ByteLevel"
        or any(step.get("add_prefix_space") for step in steps)
        or any(token["lstrip"] or token["rstrip"] for token in backend["added_tokens"])
    ):
        return None
    # A character of a piece is a byte; an added token is written as it is.
    sizes = {id: len(piece) for piece, id in model["vocab"].items()}
    sizes |= {token["id"]: len(token["content"].encode()) for token in backend["added_tokens"]}
    table = np.zeros(max(sizes) + 1, np.int32)
    table[list(sizes.keys())] = list(sizes.values())
    return table


class ChunkTokenizer:
    """Turns chunks into tokens by one recipe. Holds tokenizers: make one in each process."""

    def __init__(self, recipe: Recipe) -> None:
        """Take the recipe; the tokenizers are loaded when they are first needed."""
        self._recipe = recipe
        self._convert = FORMATS[recipe.format].convert
        self._backend: Backend = json.loads(recipe.backend)
        self._control = control_tokens(self._backend)
        self._start = [] if recipe.bos is None else [recipe.bos]
        self._end = [] if recipe.eos is None else [recipe.eos]

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        """Parse, check, render and tokenise the records of a chunk; what cannot be trained on goes to `bad`.

        Raises:
            DataError: the template is no valid Jinja.
            ModelError: the tokenizer changes the private characters that stand for control tokens.
        """
        if self._recipe.stage == "pretrain":
            return self._texts(chunk)
        if self._recipe.stage == "sft":
            return self._conversations(chunk)
        return self._labelled(chunk) if self._recipe.stage == "kto" else self._pairs(chunk)

    @cached_property
    def _plain(self) -> _Encoder:
        return _Encoder(self._backend)

    @cached_property
    def _renamed(self) -> _Encoder:
        if self._control is None:
            return self._plain
        encoder = _Encoder(renamed_backend(self._backend, self._control.written))
        ids = {token["content"]: token["id"] for token in self._backend["added_tokens"]}
        for text, name in self._control.written.items():
            if encoder.tokenizer.encode(name, add_special_tokens=False).ids[-1:] != [ids[text]]:
                raise ModelError(
                    f"the tokenizer changes private characters, so the text {text!r} in a content cannot be kept apart from "
                    "the control token. Use a tokenizer that keeps them: model.tokenizer."
                )
        encoder.tokenizer.encode_special_tokens = self._recipe.stage == "pretrain"  # a text is content only
        return encoder

    def _texts(self, chunk: Chunk) -> TokenizedChunk:
        work, control = _Work(chunk), self._control
        items: list[tuple[int, Rendered]] = []
        for line, record in work.records():
            try:
                content = self._convert(rename(record, self._recipe.fields))
                assert isinstance(content, str)
                quotes = control is not None and control.pattern.search(content) is not None
                renamed = control is not None and (quotes or control.always)
                if control is not None and renamed:
                    control.hide(content)  # refuses what could be taken for the new names
            except BadRecordError as error:
                work.refuse(line, error)
                continue
            items.append((line, Rendered(content, [], quotes, renamed)))
        documents = []
        for line, ids in self._in_order(work, items, lambda encoder, some: encoder.ids([item.text for item in some])):
            if ids:
                documents.append((line, np.array([*self._start, *ids, *self._end], self._recipe.dtype)))
            else:
                work.counts[EMPTY_COUNT] += 1
        return work.done(documents, None, self._recipe.dtype)

    def _conversations(self, chunk: Chunk) -> TokenizedChunk:
        recipe = self._recipe
        assert recipe.template is not None
        work = _Work(chunk)
        items: list[tuple[int, Rendered]] = []
        for line, record in work.records():
            try:
                conversation = self._convert(rename(record, recipe.fields))
                assert isinstance(conversation, Conversation)
                item = render_conversation(
                    conversation, recipe.template, recipe.special_tokens, train_on=recipe.train_on, control=self._control
                )
            except BadRecordError as error:
                work.refuse(line, error)
                continue
            items.append((line, item))
        documents, spans = [], []
        for line, (ids, found) in self._in_order(work, items, _Encoder.ids_and_spans):
            if isinstance(found, BadRecordError):
                work.refuse(line, found)
            else:
                documents.append((line, ids.astype(recipe.dtype)))
                spans.append(found)
        return work.done(documents, spans, recipe.dtype)

    def _pairs(self, chunk: Chunk) -> TokenizedChunk:
        """Two documents for each record, the chosen one first."""
        recipe = self._recipe
        assert recipe.template is not None
        work = _Work(chunk)
        items: list[tuple[int, Rendered]] = []
        margins: list[float] = []
        for line, record in work.records():
            try:
                pair = self._convert(rename(record, recipe.fields))
                assert isinstance(pair, Pair)
                items += [
                    (line, render_conversation(each, recipe.template, recipe.special_tokens, control=self._control))
                    for each in (pair.chosen, pair.rejected)
                ]
                margins.append(pair.margin)
            except BadRecordError as error:
                work.refuse(line, error)
        documents, spans = [], []
        kept: list[float] = []
        encoded = self._in_order(work, items, _Encoder.ids_and_spans)
        for (line, chosen), (_, rejected), margin in zip(encoded, encoded, margins, strict=True):
            try:
                both = self._targets_of_pair(chosen, rejected)
            except BadRecordError as error:
                work.refuse(line, error)
                continue
            documents += [(line, ids.astype(recipe.dtype)) for ids, _ in both]
            spans += [found for _, found in both]
            kept += [margin, 0.0]
            work.counts[MARGIN_COUNT] += recipe.stage == "reward" and margin != 0.0
        done = work.done(documents, spans, recipe.dtype)
        return replace(done, margins=np.array(kept)) if recipe.stage == "reward" else done

    def _labelled(self, chunk: Chunk) -> TokenizedChunk:
        """Two documents for each record: its own, and its prompt with the answer of a later record of the chunk.

        The answer is the first that is another; after the last record comes the first one.
        """
        recipe = self._recipe
        assert recipe.template is not None
        work = _Work(chunk)
        records: list[tuple[int, Labelled]] = []
        own: list[tuple[int, Rendered]] = []

        def render(conversation: Conversation) -> Rendered:
            return render_conversation(conversation, str(recipe.template), recipe.special_tokens, control=self._control)

        for line, record in work.records():
            try:
                labelled = self._convert(rename(record, recipe.fields))
                assert isinstance(labelled, Labelled)
                own.append((line, render(labelled.conversation)))
            except BadRecordError as error:
                work.refuse(line, error)
                continue
            records.append((line, labelled))
        items: list[tuple[int, Rendered]] = []
        kinds: list[tuple[int, int]] = []
        for index, (line, labelled) in enumerate(records):
            others = (records[(index + step) % len(records)][1].ending for step in range(1, min(len(records), _NEIGHBOURS)))
            ending = next((each for each in others if each != labelled.ending), None)
            other = own[index][1] if ending is None else render(labelled.with_ending(ending))
            items += [own[index], (line, other)]
            kinds.append((WANTED if labelled.desirable else UNWANTED, UNUSED if ending is None else OTHERS))
        documents, spans = [], []
        kept: list[int] = []
        encoded = self._in_order(work, items, _Encoder.ids_and_spans)
        for (line, first), (_, second), kind in zip(encoded, encoded, kinds, strict=True):
            try:
                both = [self._targets_of_answer("completion", *each) for each in (first, second)]
            except BadRecordError as error:
                work.refuse(line, error)
                continue
            documents += [(line, ids.astype(recipe.dtype)) for ids, _ in both]
            spans += [found for _, found in both]
            kept += kind
        return replace(work.done(documents, spans, recipe.dtype), kinds=np.array(kept, np.int8))

    def _targets_of_pair(self, *answers: tuple[NDArray[np.int32], list[Span] | BadRecordError]) -> list[_Spanned]:
        """What is a target of a chosen and a rejected answer.

        Raises:
            BadRecordError: it cannot be told, nothing differs, or there is no room for an answer.
        """
        recipe, both = self._recipe, []
        for name, (ids, spans) in zip(("chosen", "rejected"), answers, strict=True):
            _, found = self._targets_of_answer(name, ids, spans)
            if recipe.stage == "reward":
                # Where transformers' own class reads the value: the last token that is no padding.
                # Source: transformers 5.23, modeling_layers.py, GenericForSequenceClassification.
                last = int(np.flatnonzero(ids != recipe.pad)[-1]) if recipe.pad is not None else len(ids) - 1
                found = [(last, last + 1)]
            both.append((ids, found))
        if np.array_equal(both[0][0], both[1][0]):
            what = "`chosen` and `rejected` become the same tokens, so there is nothing to prefer; remove the record"
            raise BadRecordError(Reason.EQUAL_ANSWERS, what)
        return both

    def _targets_of_answer(self, name: str, ids: NDArray[np.int32], found: list[Span] | BadRecordError) -> _Spanned:
        """The same ids and spans, when they can be trained on.

        Raises:
            BadRecordError: it cannot be told what the answer is, or there is no room for it.
        """
        if isinstance(found, BadRecordError):
            raise BadRecordError(found.reason, f"`{name}`: {found}")
        if not found:
            raise BadRecordError(Reason.NOTHING_TRAINED, f"`{name}` has no token of its own; write the answer")
        prompt, room = found[0][0], self._recipe.row_tokens
        if room is not None and prompt >= room:
            raise BadRecordError(
                Reason.PROMPT_TOO_LONG,
                f"the prompt takes {prompt:,} tokens, and a row has {room:,} (data.seq_len), so no answer has room; shorten "
                "it, raise data.seq_len, or remove the record",
            )
        return ids, found

    def _in_order(
        self,
        work: _Work,
        items: Sequence[tuple[int, Rendered]],
        encode: Callable[[_Encoder, Sequence[Rendered]], Iterator[Item]],
    ) -> Iterator[tuple[int, Item]]:
        """Encode each item by the tokenizer it needs."""
        plain = [item for _, item in items if not item.renamed]
        renamed = [item for _, item in items if item.renamed]
        of_plain = encode(self._plain, plain) if plain else iter(())
        of_renamed = encode(self._renamed, renamed) if renamed else iter(())
        for line, item in items:
            work.counts[CONTROL_COUNT] += item.quotes_control
            yield line, next(of_renamed if item.renamed else of_plain)


class _Encoder:
    """A tokenizer that tells ids, and token positions where characters are known."""

    def __init__(self, backend: Backend) -> None:
        self.tokenizer = Tokenizer.from_str(json.dumps(backend))
        if hasattr(self.tokenizer.model, "_resize_cache"):
            self.tokenizer.model._resize_cache(CACHED_WORDS)
        self._lengths = byte_lengths(backend)

    def ids(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for batch in _batches(texts):
            for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids

    def ids_and_spans(self, items: Sequence[Rendered]) -> Iterator[tuple[NDArray[np.int32], list[Span] | BadRecordError]]:
        if self._lengths is not None:
            for item, ids in zip(items, self.ids([item.text for item in items]), strict=True):
                array = np.array(ids, np.int32)
                yield array, self._spans(item, array, self._lengths)
            return
        for batch in _batches(items):
            encodings = self.tokenizer.encode_batch([item.text for item in batch], add_special_tokens=False)
            for item, encoding in zip(batch, encodings, strict=True):
                yield np.array(encoding.ids, np.int32), _spans_by_offsets(item, encoding)

    def _spans(self, item: Rendered, ids: NDArray[np.int32], lengths: NDArray[np.int32]) -> list[Span] | BadRecordError:
        ends = lengths[ids].cumsum()
        text, borders = item.text, [border for span in item.trained for border in span]
        if not text.isascii():
            pieces = zip([0, *borders], [*borders, len(text)], strict=True)
            *borders, size = accumulate(len(text[start:end].encode()) for start, end in pieces)
        else:
            size = len(text)
        if not len(ends) or ends[-1] != size:  # normalised, or with bytes that the vocabulary lacks
            return _spans_by_offsets(item, self.tokenizer.encode(text, add_special_tokens=False))
        tokens = ends.searchsorted(borders, side="right").tolist()
        for index, (token, border) in enumerate(zip(tokens, borders, strict=True)):
            if border != (ends[token - 1] if token else 0):
                return across_border([border for span in item.trained for border in span][index])
        return list(zip(tokens[::2], tokens[1::2], strict=True))


def _spans_by_offsets(item: Rendered, encoding: Encoding) -> list[Span] | BadRecordError:
    try:
        return trained_tokens(encoding.offsets, item.trained)
    except BadRecordError as error:
        return error


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


class _Work:
    """What comes together while a chunk is tokenised."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk = chunk
        self._read = 0
        self._bad: list[BadRecord] = []
        self.counts: Counter[str] = Counter()

    def records(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The records with their lines; those that cannot be parsed are kept as bad."""
        for item in parse_chunk(self._chunk, self.counts):
            if isinstance(item, BadRecord):
                self._bad.append(item)
                self._read += item.line > 0  # line 0 is a bad file, which is no record
            else:
                self._read += 1
                yield item

    def refuse(self, line: int, error: BadRecordError) -> None:
        self._bad.append(BadRecord(self._chunk.path, line, error.reason, str(error)))

    def done(
        self, documents: Sequence[tuple[int, NDArray[Any]]], spans: Sequence[Sequence[Span]] | None, dtype: str
    ) -> TokenizedChunk:
        return TokenizedChunk(
            tokens=np.concatenate([np.empty(0, dtype), *(tokens for _, tokens in documents)]),
            lengths=_array([len(tokens) for _, tokens in documents]),
            spans=None if spans is None else _array(list(chain.from_iterable(spans))).reshape(-1, 2),
            span_counts=None if spans is None else _array([len(each) for each in spans]),
            lines=np.array([line for line, _ in documents], np.int64),
            read=self._read,
            bad=tuple(sorted(self._bad, key=lambda bad: bad.line)),
            counts={name: count for name, count in self.counts.items() if count},
        )


def _array(values: Sequence[Any]) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def _normalizers(normalizer: Mapping[str, Any] | None) -> set[str]:
    if normalizer is None:
        return set()
    if normalizer["type"] == "Sequence":
        return set().union(*(_normalizers(each) for each in normalizer["normalizers"]))
    return {normalizer["type"]}
