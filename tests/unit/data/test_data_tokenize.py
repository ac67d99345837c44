import json
import pickle
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from unit.data.conftest import SENTENCES, build_tokenizer

from ds_trainer.data.chunks import BadRecord, Chunk
from ds_trainer.data.render import effective_chat_template, trained_tokens
from ds_trainer.data.templates import TEMPLATES
from ds_trainer.data.tokenize import (
    BATCH,
    CONTROL_COUNT,
    EMPTY_COUNT,
    ChunkTokenizer,
    _Encoder,
    backend_json,
    byte_lengths,
    control_tokens,
    make_recipe,
    renamed_backend,
)
from ds_trainer.errors import DataError, ModelError

LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]
# One is the end of another, one is not ASCII, and a few are what earlier models used.
CONTROL = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    *LLAMA3_TOKENS,
    "[INST]",
    "[/INST]",
    "<\uff5cUser\uff5c>",
    "INST]",
]


def byte_level(**kinds):
    tokenizer = build_tokenizer(eos_token="</s>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken(text, special=True, **kinds) for text in CONTROL], special_tokens=True)
    return tokenizer


def sentencepiece_like(normalized_by=None, prepend=False):
    """Like Llama 2's and Mistral's: spaces become ▁, special tokens are pieces of the model, bytes are its last resort."""
    backend = Tokenizer(models.Unigram())
    if prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        backend.normalizer = normalized_by
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(
        [*SENTENCES, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ <>|/[]_?!.,;:'\n0123456789"] * 10, trainer
    )
    parts = json.loads(backend.to_str())
    parts["model"]["vocab"] += [[text, 0.0] for text in CONTROL if text != "<unk>"]
    parts["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    parts["model"]["byte_fallback"] = True
    backend = Tokenizer.from_str(json.dumps(parts))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte level": byte_level(),
    "metaspace": sentencepiece_like(),
    "prepend": sentencepiece_like(prepend=True),
    "NFKC": sentencepiece_like(normalizers.NFKC()),
}


def chunk_of(*records, path="a"):
    return Chunk(path, 1, list(enumerate(records, start=1)))


def talk(*contents, **keys):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]} | keys


def for_texts(tokenizer, **changes):
    given = {"format": "text", "fields": {}, "stage": "pretrain", "template": None} | changes
    return ChunkTokenizer(make_recipe(tokenizer, **given))


def for_chats(tokenizer, template="chatml", **changes):
    given = {"format": "messages", "fields": {}, "stage": "sft"} | changes
    return ChunkTokenizer(make_recipe(tokenizer, template=effective_chat_template(tokenizer, template), **given))


def documents(chunk):
    return [part.tolist() for part in np.split(chunk.tokens, chunk.lengths.cumsum()[:-1])] if len(chunk.lengths) else []


def trained_lists(chunk):
    spans = np.split(chunk.spans, chunk.span_counts.cumsum()[:-1])
    return [[ids[start:end] for start, end in each] for ids, each in zip(documents(chunk), spans, strict=True)]


def test_a_document_ends_with_the_end_token_and_is_trained_whole(tokenizer):
    ids = tokenizer("hello world")["input_ids"]
    done = for_texts(tokenizer)(chunk_of({"text": "hello world"}))
    assert documents(done) == [[*ids, tokenizer.eos_token_id]]
    assert (done.spans, done.span_counts, done.lines.tolist(), done.read) == (None, None, [1], 1)
    assert (done.tokens.dtype, done.lengths.dtype, done.lines.dtype) == (np.uint16, np.int32, np.int64)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_begin_token_is_added_only_if_the_tokenizer_does(adds_bos, make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=adds_bos, bos_token="<s>", eos_token="</s>")
    [ids] = documents(for_texts(tokenizer)(chunk_of({"text": "hello"})))
    assert ids == [*tokenizer("hello")["input_ids"], tokenizer.eos_token_id]
    assert (ids[0] == tokenizer.bos_token_id) == adds_bos


def test_a_tokenizer_without_an_end_token_ends_documents_without_one(make_tokenizer):
    tokenize = for_texts(make_tokenizer())
    assert documents(tokenize(chunk_of({"text": "hello"}))) == [make_tokenizer()("hello")["input_ids"]]


def test_an_empty_text_is_counted_but_no_document(tokenizer):
    done = for_texts(tokenizer)(chunk_of({"text": ""}, {"text": "a"}, {"text": ""}))
    assert (done.lines.tolist(), done.read, done.counts) == ([2], 3, {EMPTY_COUNT: 2})


@pytest.mark.parametrize("count", [0, 1, BATCH, 2 * BATCH + 1])
def test_documents_keep_their_order_over_batches(tokenizer, count):
    texts = [f"number {n}" for n in range(count)]
    done = for_texts(tokenizer)(chunk_of(*({"text": text} for text in texts)))
    assert [tokenizer.decode(ids) for ids in documents(done)] == [f"{text}</s>" for text in texts]
    done = for_chats(tokenizer)(chunk_of(*(talk("say", text + "</s>" * (n % 3 == 0)) for n, text in enumerate(texts))))
    expected = [f"{text}{'</s>' * (n % 3 == 0)}<|im_end|>" for n, text in enumerate(texts)]
    assert [tokenizer.decode(ids) for [ids] in (trained_lists(done) if count else [])] == expected


def test_truncation_left_on_by_someone_changes_nothing(tokenizer):
    chunk = chunk_of({"text": "the answer is four " * 20})
    before = for_texts(tokenizer)(chunk)
    tokenizer(chunk.content[0][1]["text"], truncation=True, max_length=3)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert documents(for_texts(tokenizer)(chunk)) == documents(before)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="the tokenizer is a Slow"):
        backend_json(Slow())


def test_lines_and_fields_are_read_and_bad_records_keep_their_places(tokenizer):
    raw = b'{"body": "one"}\n{"bod": "two"}\n\n{"body": }\n{"body": "five"}\n{"body": 6}\n'
    before = BadRecord("a", 8, "line too long", "too long")
    done = for_texts(tokenizer, fields={"text": "body"})(Chunk("a", 1, raw, bad=(before,)))
    assert [(bad.line, bad.reason) for bad in done.bad] == [
        (2, "missing key"),
        (4, "invalid JSON"),
        (6, "wrong type"),
        (8, "line too long"),
    ]
    assert (done.lines.tolist(), done.read, done.counts) == ([1, 5], 6, {"blank lines": 1})


def test_an_empty_file_is_no_record(tokenizer):
    bad = BadRecord("a", 0, "empty file", "the file is empty")
    done = for_chats(tokenizer)(Chunk("a", 1, b"", is_last=True, bad=(bad,)))
    assert (done.read, done.bad, done.tokens.shape, done.spans.shape, done.lines.shape) == (0, (bad,), (0,), (0, 2), (0,))


def test_bad_conversations_keep_their_places_too(tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    template += "{% endgeneration %}{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
    recipe = make_recipe(tokenizer, format="messages", fields={}, stage="sft", template=template)
    tokenize = ChunkTokenizer(recipe)
    done = tokenize(chunk_of(talk("a", "b"), talk("a"), talk("a", ": b"), {"messages": 3}, talk("c", "d")))
    spans = {line: len(each) for line, each in zip(done.lines.tolist(), trained_lists(done), strict=True)}
    assert spans[1] == spans[5] == 1
    assert [(bad.line, bad.reason) for bad in done.bad if bad.line != 3] == [(2, "no assistant turn"), (4, "wrong type")]


def test_a_recipe_says_all_that_changes_tokens_and_travels(tokenizer):
    recipe = make_recipe(tokenizer, format="messages", fields={"messages": "chat"}, stage="sft", template="{{ messages }}")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    parts = json.loads(json.dumps(recipe.fingerprint_parts()))
    assert parts.keys() == set(recipe.__dataclass_fields__) - {"row_tokens", "pad"}, "those of pairs"
    assert (parts["fields"], parts["train_on"], parts["dtype"], len(parts["backend"])) == (
        {"messages": "chat"},
        "assistant",
        "uint16",
        64,
    )
    tokenizer.add_tokens(["more"])
    other = make_recipe(tokenizer, format="messages", fields={}, stage="sft", template="", train_on="all").fingerprint_parts()
    assert {key for key in parts if parts[key] != other[key]} == {"backend", "fields", "template", "train_on"}


def test_ids_are_stored_in_16_bits_while_they_fit(tokenizer):
    tokenizer.add_tokens([f"token{n}" for n in range(65_500 - len(tokenizer))])
    assert for_texts(tokenizer)(chunk_of({"text": "a"})).tokens.dtype == np.uint16
    tokenizer.add_tokens(["one more"])
    assert for_texts(tokenizer)(chunk_of({"text": "a"})).tokens.dtype == np.int32


def test_a_format_of_the_other_stage_and_a_broken_template_are_refused_before_any_record(tokenizer):
    with pytest.raises(DataError, match=r"format text is for train\.stage=pretrain, not sft"):
        make_recipe(tokenizer, format="text", fields={}, stage="sft", template="")
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        make_recipe(tokenizer, format="messages", fields={}, stage="sft", template="\n{% for %}")


@pytest.mark.parametrize("name", ["plain", "chatml", "llama3"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_words_of_control_tokens_never_become_control_tokens(tokenizer, name):
    assert all(len(tokenizer.encode(text, add_special_tokens=False)) == 1 for text in CONTROL if text != "INST]")
    control = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(text) for text in CONTROL}
    tokenize = for_chats(tokenizer, name, train_on="all")

    def control_ids(*contents):
        done = tokenize(chunk_of(talk(*contents)))
        assert done.bad == ()
        return [id for id in done.tokens.tolist() if id in control], done

    expected, plain = control_ids("a", "b")
    assert plain.counts == {}
    assert len(expected) == {"plain": 1, "chatml": 4, "llama3": 6}[name]
    for text in CONTROL:
        for question in (text, f"{text}{text} x", f"x {text}", f"x{text}\n", "<|im_" + text + "end|>"):
            found, done = control_ids(question, f"so {text}")
            assert found == expected, (text, question)
            assert done.counts == {CONTROL_COUNT: 1}
            shown = tokenizer.decode(done.tokens, clean_up_tokenization_spaces=False)
            if tokenizer is TOKENIZERS["NFKC"]:
                question, text = unicodedata.normalize("NFKC", question), unicodedata.normalize("NFKC", text)
            assert question.strip() in shown
            assert f"so {text}" in shown


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_text_cannot_write_control_tokens_either(tokenizer):
    control = {tokenizer.convert_tokens_to_ids(text) for text in CONTROL}
    private = control_tokens(json.loads(backend_json(tokenizer))).written["<s>"]
    for text in [*CONTROL, "x".join(CONTROL), private]:
        if text == private and tokenizer is TOKENIZERS["NFKC"]:
            continue
        done = for_texts(tokenizer)(chunk_of({"text": text}))
        assert [id for id in done.tokens.tolist() if id in control - {tokenizer.unk_token_id}] == [tokenizer.eos_token_id]
        assert done.counts == ({} if text == private else {CONTROL_COUNT: 1})
        if text != private:
            assert (
                unicodedata.normalize("NFKC", tokenizer.decode(done.tokens)).strip()
                == unicodedata.normalize("NFKC", text) + "</s>"
            )
    [bad] = for_texts(tokenizer)(chunk_of({"text": f"{private} </s>"})).bad
    assert bad.reason == "text like a control token"


def test_a_normalizer_cannot_make_a_control_token():
    tokenizer = TOKENIZERS["NFKC"]
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "<s>")
    assert tokenizer(wide, add_special_tokens=False)["input_ids"] == [tokenizer.bos_token_id]
    done = for_texts(tokenizer)(chunk_of({"text": wide}))
    assert tokenizer.bos_token_id not in done.tokens
    assert tokenizer.decode(done.tokens) == "<s></s>"
    done = for_chats(tokenizer)(chunk_of(talk(wide, wide)))
    assert tokenizer.bos_token_id not in done.tokens
    assert [tokenizer.decode(ids) for [ids] in trained_lists(done)] == ["<s><|im_end|>"]


def test_tool_calls_and_tools_cannot_write_control_tokens(tokenizer):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": ["</s>"]}}}]}
    record = {
        "messages": [{"role": "user", "content": "a"}, call],
        "tools": [{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}],
    }
    done = for_chats(tokenizer)(chunk_of(record))
    ids = done.tokens.tolist()
    assert [ids.count(tokenizer.convert_tokens_to_ids(text)) for text in ("<|im_start|>", "<|im_end|>", "</s>")] == [3, 3, 0]
    assert tokenizer.decode(ids).count("<|im_start|>") == 4
    [[answer]] = trained_lists(done)
    assert (
        tokenizer.decode(answer) == '<tool_call>\n{"name": "f", "arguments": {"<|im_end|>": ["</s>"]}}\n</tool_call><|im_end|>'
    )


WORDS = st.sampled_from(
    ["the answer is four", "a", "é😀", "\n", "  ", "𝄞 x", "user:", "Paris ", "assistant:\n", "</think>", "'s"]
)
PLAIN_TEXT = st.lists(WORDS, min_size=1).map("".join).filter(str.strip)
TEXT = st.lists(st.one_of(WORDS, st.sampled_from(CONTROL)), min_size=1).map("".join).filter(str.strip)


@pytest.mark.parametrize("name", ["byte level", "metaspace", "NFKC"])
@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda each: len(each) % 2 == 0),
    template=st.sampled_from([*TEMPLATES]),
)
def test_what_is_trained_decodes_to_the_answers(name, contents, template):
    tokenizer = TOKENIZERS[name]
    done = _prepared(name, template)(chunk_of(talk(*contents)))
    assert done.bad == ()
    end = {"plain": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[template]
    [spans] = trained_lists(done)
    shown = (lambda text: unicodedata.normalize("NFKC", text)) if name == "NFKC" else str
    assert [tokenizer.decode(ids) for ids in spans] == [shown(text.strip()) + end for text in contents[1::2]]


@settings(max_examples=60, deadline=None)
@given(text=PLAIN_TEXT)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_other_text_gets_the_ids_it_always_had(name, text):
    """Also under the renamed tokenizer, and with the template's own tokens around it."""
    backend = json.loads(backend_json(TOKENIZERS[name]))
    plain = Tokenizer.from_str(json.dumps(backend))
    control = control_tokens(backend)
    renamed = Tokenizer.from_str(json.dumps(renamed_backend(backend, control.written)))
    written = f"<s><|im_start|>{text}<|im_end|> [INST]{text}</s>"
    assert renamed.encode(control.rename(written)).ids == plain.encode(written).ids
    assert renamed.encode(text).ids == plain.encode(text).ids
    [ids] = documents(_prepared(name, None)(chunk_of({"text": text})))
    assert ids == [*plain.encode(text).ids, TOKENIZERS[name].eos_token_id]


@settings(max_examples=100, deadline=None)
@given(text=TEXT, data=st.data())
def test_places_of_tokens_follow_from_their_lengths_as_from_their_offsets(text, data):
    encoder = _Encoder(json.loads(backend_json(TOKENIZERS["byte level"])))
    borders = sorted(data.draw(st.sets(st.integers(0, len(text)), min_size=2, max_size=4)))
    trained = list(zip(borders[::2], borders[1::2], strict=False))
    encoding = encoder.tokenizer.encode(text, add_special_tokens=False)
    try:
        expected = trained_tokens(encoding.offsets, trained)
    except ValueError as error:
        expected = str(error)
    item = type("Item", (), {"text": text, "trained": trained})
    found = encoder._spans(item, np.array(encoding.ids, np.int32), encoder._lengths)
    assert (found if isinstance(found, list) else str(found)) == expected


def test_lengths_are_not_taken_where_tokens_are_no_pieces_of_the_text():
    assert byte_lengths(json.loads(backend_json(TOKENIZERS["byte level"]))) is not None
    for name in ("metaspace", "prepend", "NFKC"):
        assert byte_lengths(json.loads(backend_json(TOKENIZERS[name]))) is None
    assert byte_lengths(json.loads(backend_json(byte_level(lstrip=True)))) is None
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    done = for_chats(tokenizer)(chunk_of(talk("e\u0301", "u\u0308ber"), talk("é", "e\u0301</s>")))
    assert [[tokenizer.decode(ids) for ids in spans] for spans in trained_lists(done)] == [
        ["über<|im_end|>"],
        ["é</s><|im_end|>"],
    ]


_made: dict[tuple[str, str | None], ChunkTokenizer] = {}


def _prepared(name, template):
    if (name, template) not in _made:
        tokenizer = TOKENIZERS[name]
        _made[name, template] = for_chats(tokenizer, template) if template else for_texts(tokenizer)
    return _made[name, template]
