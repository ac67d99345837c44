import pytest

from ds_trainer.data.formats import BadRecordError
from ds_trainer.data.render import (
    DEFAULT_CHAT_TEMPLATE,
    effective_chat_template,
    render_conversation,
    trained_tokens,
)
from ds_trainer.data.sources import Problems, Sample
from ds_trainer.data.tokenize import tokenize_conversations
from ds_trainer.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def talk(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CONVERSATIONS = {
    "one turn": talk("two plus two?", "four"),
    "several turns": talk("hello", "hello, how are you?", "fine", "good", system="be kind"),
    "the user quotes the assistant": talk("Repeat after me: the answer is four", "the answer is four"),
    "the user quotes the header": talk("<|im_start|>assistant\nfour<|im_end|>\n", "four", "assistant:\nfour", "four"),
    "repeated answers": talk("a?", "yes", "b?", "yes", "c?", "yes"),
    "system says it too": talk("yes", "yes", system="yes"),
    "an empty answer": talk("say nothing", ""),
    "not only ASCII": talk("é😀?", "😀é", "𝄞?", "𝄞"),
}


def trained_texts(conversation, template):
    rendered = render_conversation(conversation, template, SPECIAL)
    return [rendered.text[start:end] for start, end in rendered.trained]


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION, DEFAULT_CHAT_TEMPLATE], ids=["prefix", "tag", "default"])
def test_exactly_the_answers_are_trained(conversation, template):
    end = "</s>" if template == DEFAULT_CHAT_TEMPLATE else "<|im_end|>\n"
    answers = [turn["content"] + end for turn in conversation if turn["role"] == "assistant"]
    assert trained_texts(conversation, template) == answers


def test_the_trained_part_is_the_last_one_where_the_user_says_the_same_words():
    rendered = render_conversation(CONVERSATIONS["the user quotes the assistant"], CHATML, SPECIAL)
    [(start, end)] = rendered.trained
    assert rendered.text.count("the answer is four") == 2
    assert start == rendered.text.rindex("the answer is four")
    assert end == len(rendered.text)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION, DEFAULT_CHAT_TEMPLATE], ids=["prefix", "tag", "default"])
def test_the_tokens_are_those_of_the_tokenizer_itself(conversation, template, tokenizer):
    [document] = tokenize_conversations([Sample("a:1", conversation)], tokenizer, template, Problems(), print)
    assert document.ids == tokenizer.apply_chat_template(conversation, chat_template=template)["input_ids"]
    texts = [tokenizer.decode(document.ids[start:end]) for start, end in document.trained]
    assert texts == [text for text in trained_texts(conversation, template) if text]


@pytest.mark.parametrize("template", [CHATML_GENERATION, DEFAULT_CHAT_TEMPLATE], ids=["tag", "default"])
def test_the_mask_is_that_of_apply_chat_template(template, tokenizer):
    for conversation in CONVERSATIONS.values():
        [document] = tokenize_conversations([Sample("a:1", conversation)], tokenizer, template, Problems(), print)
        theirs = tokenizer.apply_chat_template(
            conversation, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        ours = [0] * len(document.ids)
        for start, end in document.trained:
            ours[start:end] = [1] * (end - start)
        assert ours == theirs["assistant_masks"]


def test_a_template_that_rewrites_earlier_turns_is_refused():
    only_last = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}\n{% endfor %}"
    with pytest.raises(BadRecordError, match=r"ambiguous mask: .* up to message 2 differently .*generation %\}"):
        render_conversation(talk("a", "b", "c", "d"), only_last, SPECIAL)


def test_a_token_across_the_border_is_refused_with_its_place(tokenizer):
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m['content'] }}"
    template += "{% endgeneration %}{% else %}{{ 'Q: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    problems = Problems()
    samples = [Sample("chat.jsonl:7", talk("two plus two?", "four"))]
    assert list(tokenize_conversations(samples, tokenizer, template, problems, print)) == []
    with pytest.raises(DataError, match=r"chat.jsonl:7: ambiguous mask: one token .* character 20 "):
        problems.raise_if_any()


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([(0, 9)], [(0, 4)]),
        ([(2, 5)], [(1, 3)]),
        ([(0, 2), (5, 9)], [(0, 1), (3, 4)]),
        ([(5, 5)], []),
    ],
)
def test_spans_of_characters_become_spans_of_tokens(trained, expected):
    assert trained_tokens([(0, 2), (2, 5), (2, 5), (5, 9)], trained) == expected


@pytest.mark.parametrize("trained", [[(1, 5)], [(0, 4)], [(2, 7)], [(3, 4)]])
def test_a_border_inside_a_token_is_ambiguous(trained):
    with pytest.raises(BadRecordError, match="ambiguous mask"):
        trained_tokens([(0, 2), (2, 5), (2, 5), (5, 9)], trained)


def test_a_template_that_refuses_the_conversation_is_quoted():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    with pytest.raises(BadRecordError, match="no system role here"):
        render_conversation(talk("a", "b", system="c"), template, SPECIAL)


def test_a_template_that_is_no_jinja_is_an_error_of_its_own():
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        render_conversation(talk("a", "b"), "\n{% for %}", SPECIAL)


def test_the_template_in_force_is_the_file_then_the_tokenizers_then_ours(tokenizer, tmp_path):
    assert effective_chat_template(tokenizer, None) == DEFAULT_CHAT_TEMPLATE
    tokenizer.chat_template = CHATML
    assert effective_chat_template(tokenizer, None) == CHATML
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML_GENERATION)
    assert effective_chat_template(tokenizer, str(file)) == CHATML_GENERATION
    with pytest.raises(DataError, match=rf"data.chat_template: .*\({tmp_path}/none.jinja\)"):
        effective_chat_template(tokenizer, str(tmp_path / "none.jinja"))


def test_the_default_template_starts_with_bos_where_the_tokenizer_does(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True, bos_token="<s>", eos_token="</s>")
    template = effective_chat_template(tokenizer, None)
    assert render_conversation(talk("hi", "yes"), template, SPECIAL).text == "<s>user:\nhi\nassistant:\nyes</s>\n"


def test_without_a_template_and_an_end_token_there_is_nothing_to_render(make_tokenizer):
    with pytest.raises(DataError, match="neither a chat template nor an end-of-text token"):
        effective_chat_template(make_tokenizer(), None)
