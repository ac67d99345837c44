import pytest

from ds_trainer.data import tokenize
from ds_trainer.data.sources import Sample
from ds_trainer.data.tokenize import Document, tokenize_texts
from ds_trainer.errors import ModelError


def samples(*texts):
    return [Sample(f"a:{line}", text) for line, text in enumerate(texts, start=1)]


def test_a_document_ends_with_the_end_token_and_is_trained_whole(tokenizer):
    ids = tokenizer("hello world")["input_ids"]
    expected = Document([*ids, tokenizer.eos_token_id], [(0, len(ids) + 1)])
    assert list(tokenize_texts(samples("hello world"), tokenizer, print)) == [expected]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_begin_token_is_added_only_if_the_tokenizer_does(adds_bos, make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=adds_bos, bos_token="<s>", eos_token="</s>")
    [document] = tokenize_texts(samples("hello"), tokenizer, print)
    assert document.ids == [*tokenizer("hello")["input_ids"], tokenizer.eos_token_id]
    assert (document.ids[0] == tokenizer.bos_token_id) == adds_bos


def test_a_missing_end_token_is_said(reports, make_tokenizer):
    [document] = tokenize_texts(samples("hello"), make_tokenizer(), reports.append)
    assert document.ids == make_tokenizer()("hello")["input_ids"]
    assert reports == ["the tokenizer has no end-of-text token: documents end without one"]


def test_an_empty_text_has_no_tokens(tokenizer):
    assert list(tokenize_texts(samples(""), tokenizer, print)) == [Document([], [])]


def test_documents_keep_their_order_over_batches(tokenizer, monkeypatch):
    texts = [f"number {n}" for n in range(25)]
    whole = list(tokenize_texts(samples(*texts), tokenizer, print))
    monkeypatch.setattr(tokenize, "BATCH_SAMPLES", 7)
    assert list(tokenize_texts(samples(*texts), tokenizer, print)) == whole
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 20)
    assert list(tokenize_texts(samples(*texts), tokenizer, print)) == whole
    assert [tokenizer.decode(document.ids) for document in whole] == [f"{text}</s>" for text in texts]


def test_truncation_left_on_by_someone_changes_nothing(tokenizer):
    text = "the answer is four " * 20
    before = list(tokenize_texts(samples(text), tokenizer, print))
    tokenizer(text, truncation=True, max_length=3)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert list(tokenize_texts(samples(text), tokenizer, print)) == before


def test_progress_is_reported_at_most_every_few_seconds(tokenizer, reports, monkeypatch):
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(tokenize.time, "monotonic", lambda: next(clock))
    list(tokenize_texts(samples(*["hello"] * 10), tokenizer, reports.append))
    assert len(reports) == 3
    assert reports[0].startswith("tokenising: 3 records, ")
    assert "records/s" in reports[0]


def test_a_slow_tokenizer_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="the tokenizer is a Slow"):
        tokenize.backend_json(Slow())
