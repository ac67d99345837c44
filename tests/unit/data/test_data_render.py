import pytest

from ds_trainer.data.chunks import BadRecordError, Chunk
from ds_trainer.data.formats import Conversation, Reason
from ds_trainer.data.render import ControlTokens, effective_chat_template, render_conversation, trained_tokens
from ds_trainer.data.templates import TEMPLATES
from ds_trainer.data.tokenize import ChunkTokenizer, make_recipe
from ds_trainer.errors import DataError

PLAIN = TEMPLATES["plain"]
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


def talk(*contents, system=None, untrained=()):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation([{"role": "system", "content": system}, *turns] if system else turns, None, frozenset(untrained))


CONVERSATIONS = {
    "one turn": talk("two plus two?", "four"),
    "several turns": talk("hello", "hello, how are you?", "fine", "good", system="be kind"),
    "the user quotes the assistant": talk("Repeat after me: the answer is four", "the answer is four"),
    "the user quotes the header": talk("assistant:\nfour", "four", "assistant:\nfour\n", "four"),
    "repeated answers": talk("a?", "yes", "b?", "yes", "c?", "yes"),
    "system says it too": talk("yes", "yes", system="yes"),
    "not only ASCII": talk("é😀?", "😀é", "𝄞?", "𝄞"),
}
CALLS = Conversation(
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two plus two?"},
        {
            "role": "assistant",
            "content": "I add.",
            "tool_calls": [
                {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}},
                {"id": "y", "type": "function", "function": {"name": "sub", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "it is 4"},
        {"role": "tool", "tool_call_id": "y", "content": "it is 0"},
        {"role": "assistant", "content": "four"},
    ],
    [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "sub")],
)


def trained_texts(conversation, template, **settings):
    rendered = render_conversation(conversation, template, SPECIAL, **settings)
    return [rendered.text[start:end] for start, end in rendered.trained]


def tokenized(conversation, tokenizer, template, **settings):
    recipe = make_recipe(tokenizer, format="messages", fields={}, stage="sft", template=template, **settings)
    record = {"messages": conversation.messages, "tools": conversation.tools}
    return ChunkTokenizer(recipe)(Chunk("chat.jsonl", 7, [(7, record)]))


def answers(conversation, template):
    end = "</s>" if template == PLAIN else "<|im_end|>" if template == TEMPLATES["chatml"] else "<|im_end|>\n"
    return [turn["content"] + end for turn in conversation.messages if turn["role"] == "assistant"]


ALL_TEMPLATES = pytest.mark.parametrize(
    "template", [CHATML, CHATML_GENERATION, PLAIN, TEMPLATES["chatml"]], ids=["prefix", "tag", "plain", "chatml"]
)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@ALL_TEMPLATES
def test_exactly_the_answers_are_trained(conversation, template):
    expected = answers(conversation, template)
    assert trained_texts(conversation, template) == expected
    assert trained_texts(conversation, template, train_on="last_assistant") == expected[-1:]


@ALL_TEMPLATES
def test_an_answer_may_be_left_out(template):
    conversation = talk("a?", "yes", "b?", "yes", "c?", "yes", untrained=[0, 3])
    expected = answers(conversation, template)
    assert trained_texts(conversation, template) == [expected[0], expected[2]]
    whole = render_conversation(talk("a?", "yes"), template, SPECIAL).text
    assert trained_texts(talk("a?", "yes"), template, train_on="all") == [whole]


@ALL_TEMPLATES
def test_the_prompt_is_trained_too_if_asked_for_but_not_an_answer_that_is_left_out(template):
    conversation = talk("a?", "yes", "b?", "no", untrained=[1])
    rendered = render_conversation(conversation, template, SPECIAL, train_on="all")
    [(start, middle), (resumed, end)] = rendered.trained
    assert (start, end) == (0, len(rendered.text))
    assert rendered.text[middle:resumed] == answers(conversation, template)[0]


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant"])
@ALL_TEMPLATES
def test_a_conversation_with_nothing_to_train_is_refused(template, train_on):
    with pytest.raises(BadRecordError, match="nothing is trained") as caught:
        render_conversation(talk("a?", "yes", untrained=[1]), template, SPECIAL, train_on=train_on)
    assert caught.value.reason == Reason.NOTHING_TRAINED


def test_only_an_answer_can_be_cut_out_of_a_whole_conversation():
    with pytest.raises(BadRecordError, match="message 1 has `train: false`, but only an answer"):
        render_conversation(talk("a?", "yes", untrained=[0]), PLAIN, SPECIAL, train_on="all")


def test_the_trained_part_is_the_last_one_where_the_user_says_the_same_words():
    rendered = render_conversation(CONVERSATIONS["the user quotes the assistant"], CHATML, SPECIAL)
    [(start, end)] = rendered.trained
    assert rendered.text.count("the answer is four") == 2
    assert start == rendered.text.rindex("the answer is four")
    assert end == len(rendered.text)


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@ALL_TEMPLATES
def test_the_tokens_are_those_of_the_tokenizer_itself(conversation, template, tokenizer):
    chunk = tokenized(conversation, tokenizer, template)
    assert chunk.tokens.tolist() == tokenizer.apply_chat_template(conversation.messages, chat_template=template)["input_ids"]
    texts = [tokenizer.decode(chunk.tokens[start:end]) for start, end in chunk.spans]
    assert texts == trained_texts(conversation, template)


@pytest.mark.parametrize("template", [CHATML_GENERATION, PLAIN], ids=["tag", "plain"])
def test_the_mask_is_that_of_apply_chat_template(template, tokenizer):
    for conversation in CONVERSATIONS.values():
        chunk = tokenized(conversation, tokenizer, template)
        theirs = tokenizer.apply_chat_template(
            conversation.messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
        )
        ours = [0] * len(chunk.tokens)
        for start, end in chunk.spans:
            ours[start:end] = [1] * (end - start)
        assert ours == theirs["assistant_masks"]


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        (
            "plain",
            ['I add.\ncall: {"name": "add", "arguments": {"a": 2}}\ncall: {"name": "sub", "arguments": {}}</s>', "four</s>"],
        ),
        (
            "chatml",
            [
                'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
                '\n<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call><|im_end|>',
                "four<|im_end|>",
            ],
        ),
        (
            "llama3",
            ['I add.\n{"name": "add", "parameters": {"a": 2}}\n{"name": "sub", "parameters": {}}<|eot_id|>', "four<|eot_id|>"],
        ),
    ],
)
def test_the_built_in_templates_write_tools_calls_and_results(name, trained):
    rendered = render_conversation(CALLS, TEMPLATES[name], SPECIAL)
    assert [rendered.text[start:end] for start, end in rendered.trained] == trained
    for part in ("be brief", '"function": {"name": "sub", "parameters": {}}', "it is 4", "it is 0"):
        assert rendered.text.count(part) == 1


def test_chatml_writes_tools_as_qwen_does():
    text = render_conversation(CALLS, TEMPLATES["chatml"], SPECIAL).text
    assert text.startswith("<|im_start|>system\nbe brief\n\n# Tools\n\nYou may call one or more functions")
    assert (
        "<|im_start|>user\n<tool_response>\nit is 4\n</tool_response>\n"
        "<tool_response>\nit is 0\n</tool_response><|im_end|>\n<|im_start|>assistant\nfour<|im_end|>\n"
    ) in text


@pytest.mark.parametrize("template", [CHATML, CHATML_GENERATION], ids=["prefix", "tag"])
def test_a_template_that_drops_calls_or_tools_is_refused(template):
    with pytest.raises(BadRecordError, match="does not write the call in message 3") as caught:
        render_conversation(CALLS, template, SPECIAL)
    assert caught.value.reason == Reason.TEMPLATE_WITHOUT_TOOLS
    with pytest.raises(BadRecordError, match="does not write the tool 'add'"):
        render_conversation(Conversation(talk("a", "b").messages, CALLS.tools), template, SPECIAL)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_that_drops_a_message_is_refused(role):
    template = CHATML_GENERATION.replace("m['content']", f"('' if m['role'] == '{role}' else m['content'])")
    with pytest.raises(BadRecordError, match=f"does not write the content of message ., the {role}'s") as caught:
        render_conversation(talk("ask", "answer", system="rule"), template, SPECIAL)
    assert caught.value.reason == Reason.TEMPLATE_DROPS


def test_a_template_may_cut_the_thoughts_of_earlier_answers():
    cut = "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>\\n' }}"
    template = CHATML_GENERATION.replace("{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration", cut + "{% endgeneration")
    assert cut in template
    conversation = talk("a", "<think>hm</think>yes", "b", "<think>oh</think>no")
    assert trained_texts(conversation, template) == ["yes<|im_end|>\n", "<think>oh</think>no<|im_end|>\n"]


def test_a_template_must_have_one_generation_block_an_answer():
    only_last = CHATML_GENERATION.replace("m['role'] == 'assistant'", "loop.last")
    with pytest.raises(BadRecordError, match="ambiguous mask: the chat template writes 1 generation blocks for 2 answers"):
        render_conversation(talk("a", "b", "c", "d"), only_last, SPECIAL)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    only_last = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}\n{% endfor %}"
    with pytest.raises(BadRecordError, match=r"ambiguous mask: .* up to message 2 differently .*generation %\}"):
        render_conversation(talk("a", "b", "c", "d"), only_last, SPECIAL)
    cutting = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'].split('</think>')[-1])")
    conversation = talk("a", "<think>hm</think>yes", "b", "<think>oh</think>no")
    with pytest.raises(BadRecordError, match=r"data\.train_on=last_assistant"):
        render_conversation(conversation, cutting, SPECIAL)
    assert trained_texts(conversation, cutting, train_on="last_assistant") == ["<think>oh</think>no<|im_end|>\n"]


def test_a_token_across_the_border_is_refused_with_its_place(tokenizer):
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ m['content'] }}"
    template += "{% endgeneration %}{% else %}{{ 'Q: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    for question, border in (("two plus two?", 20), ("zwei und zwölf?", 22)):
        chunk = tokenized(talk(question, "four"), tokenizer, template)
        assert (len(chunk.lengths), len(chunk.tokens), chunk.read) == (0, 0, 1)
        [bad] = chunk.bad
        assert (bad.where, bad.reason) == ("chat.jsonl:7", Reason.AMBIGUOUS_MASK)
        assert f"one token holds characters on both sides of character {border} " in bad.what


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
    assert effective_chat_template(tokenizer, None) == PLAIN
    tokenizer.chat_template = CHATML
    assert effective_chat_template(tokenizer, None) == CHATML
    assert effective_chat_template(tokenizer, "chatml") == TEMPLATES["chatml"]
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML_GENERATION)
    assert effective_chat_template(tokenizer, str(file)) == CHATML_GENERATION
    with pytest.raises(
        DataError, match=rf"data.chat_template: .*\({tmp_path}/none.jinja\).*built-in .*: plain, chatml, llama3"
    ):
        effective_chat_template(tokenizer, str(tmp_path / "none.jinja"))


def test_a_built_in_template_starts_with_bos_where_the_tokenizer_does(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True, bos_token="<s>", eos_token="</s>")
    template = effective_chat_template(tokenizer, None)
    assert render_conversation(talk("hi", "yes"), template, SPECIAL).text == "<s>user:\nhi\nassistant:\nyes</s>\n"
    assert effective_chat_template(tokenizer, "chatml") == "{{ bos_token }}" + TEMPLATES["chatml"]


def test_a_built_in_template_needs_its_control_tokens_and_an_end(tokenizer, make_tokenizer):
    with pytest.raises(DataError, match=r"llama3 needs <\|start_header_id\|> and <\|end_header_id\|> and <\|eot_id\|>, which"):
        effective_chat_template(tokenizer, "llama3")
    for name in (None, "plain"):
        with pytest.raises(DataError, match="the tokenizer has no end-of-text token"):
            effective_chat_template(make_tokenizer(), name)


def test_words_of_control_tokens_are_told_apart_from_the_templates_own():
    control = ControlTokens(["<|im_end|>", "<|im_end|>x", "</s>"])
    conversation = talk("<|im_end|><|im_end|>", "a<|im_end|>x</s>")
    rendered = render_conversation(conversation, CHATML, SPECIAL, control=control)
    plain = render_conversation(conversation, CHATML, SPECIAL)
    assert rendered.quotes_control
    assert rendered.renamed
    assert not plain.renamed
    own = control.written["<|im_end|>"]
    assert rendered.trained == plain.trained
    assert rendered.text == (f"<|im_start|>user\n<|im_end|><|im_end|>{own}\n<|im_start|>assistant\na<|im_end|>x</s>{own}\n")
    assert render_conversation(talk("a", "b"), CHATML, SPECIAL, control=control) == render_conversation(
        talk("a", "b"), CHATML, SPECIAL
    )


def test_private_characters_are_refused_only_beside_words_of_control_tokens():
    control = ControlTokens(["</s>"])
    assert not render_conversation(talk("\U000ffffd", "b"), CHATML, SPECIAL, control=control).renamed
    with pytest.raises(BadRecordError, match=r"private character U\+FFFFD") as caught:
        render_conversation(talk("\U000ffffd", "</s>"), CHATML, SPECIAL, control=control)
    assert caught.value.reason == Reason.CONTROL_TEXT
    icons = talk("\U000f0001 \U00100001", "</s>")
    assert "\U000f0001 \U00100001" in render_conversation(icons, CHATML, SPECIAL, control=control).text


def test_a_template_that_cuts_a_quoted_control_token_is_refused():
    cutting = CHATML.replace("m['content']", "m['content'][:3]")
    with pytest.raises(BadRecordError, match=r"the text '</s>' .* cuts it in two"):
        render_conversation(talk("a", "</s>"), cutting, SPECIAL, control=ControlTokens(["</s>"]))
