import json
import math

import pytest

from ds_trainer.arguments.constraints import FORMATS_OF
from ds_trainer.arguments.objective import NUMBERS
from ds_trainer.data.chunks import BadRecordError
from ds_trainer.data.formats import FORMATS, Conversation, Labelled, Pair, Reason, fitting_formats, records_of

USER = {"role": "user", "content": "two plus two?"}
ASSISTANT = {"role": "assistant", "content": "four"}
OTHER = {"role": "assistant", "content": "five"}
SYSTEM = {"role": "system", "content": "be brief"}
ADD = {"name": "add", "arguments": {"a": 2, "b": 2}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"id": "x", "type": "function", "function": ADD}]}
BARE_CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": ADD}]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "x"}
BARE_RESULT = {"role": "tool", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
HUMAN = {"from": "human", "value": "two plus two?"}
GPT = {"from": "gpt", "value": "four"}
PARTS = [{"type": "text", "text": "two "}, {"type": "text", "text": "plus two?", "image_url": None}]


def conversation(*messages, tools=None, untrained=()):
    return Conversation(list(messages), tools, frozenset(untrained))


TURN = conversation(USER, ASSISTANT)
PAIR = Pair(conversation(USER, ASSISTANT, untrained=[0]), conversation(USER, OTHER, untrained=[0]))


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        ("text", {"text": "once", "id": 3}, "once"),
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, conversation(SYSTEM, USER, ASSISTANT)),
        ("messages", {"messages": [{**SYSTEM, "role": "developer"}, USER, ASSISTANT]}, conversation(SYSTEM, USER, ASSISTANT)),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": None, "name": None}], "tools": None}, TURN),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": []}], "tools": []}, TURN),
        (
            "messages",
            {"messages": [{**USER, "train": False}, {**ASSISTANT, "train": False}, USER, {**OTHER, "train": True}]},
            conversation(USER, ASSISTANT, USER, OTHER, untrained=[0, 1]),
        ),
        (
            "messages",
            {"messages": [{**USER, "content": PARTS}, ASSISTANT]},
            TURN,
        ),
        (
            "messages",
            {"messages": [USER, {**CALL, "content": None}, RESULT, ASSISTANT], "tools": [TOOL]},
            conversation(USER, CALL, RESULT, ASSISTANT, tools=[TOOL]),
        ),
        (
            "messages",
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {**ADD, "arguments": '{"a": 2, "b": 2}'}}]},
                ],
                "tools": json.dumps([TOOL]),
            },
            conversation(USER, BARE_CALL, tools=[TOOL]),
        ),
        ("sharegpt", {"conversations": [HUMAN, GPT], "system": None}, TURN),
        (
            "sharegpt",
            {"conversations": [HUMAN, {**GPT, "train": None}], "system": "be brief"},
            conversation(SYSTEM, USER, ASSISTANT),
        ),
        ("sharegpt", {"conversations": [HUMAN, {**GPT, "train": False}]}, conversation(USER, ASSISTANT, untrained=[1])),
        (
            "sharegpt",
            {
                "conversations": [
                    HUMAN,
                    {"from": "function_call", "value": json.dumps(ADD)},
                    {"from": "observation", "value": "4"},
                    GPT,
                ],
                "tools": json.dumps([TOOL]),
            },
            conversation(USER, BARE_CALL, BARE_RESULT, ASSISTANT, tools=[TOOL]),
        ),
        ("prompt_response", {"prompt": "two plus two?", "response": "four"}, TURN),
        ("prompt_response", {"prompt": "two plus two?", "completion": "four", "response": None}, TURN),
        ("alpaca", {"instruction": "two plus two?", "output": "four"}, TURN),
        ("alpaca", {"instruction": "two plus two?", "input": "", "output": "four", "system": None, "history": None}, TURN),
        ("alpaca", {"instruction": "two plus two?", "input": None, "output": "four", "system": "", "history": []}, TURN),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 2", "output": "four"},
            conversation({"role": "user", "content": "Add.\n\n2 2"}, ASSISTANT),
        ),
        (
            "alpaca",
            {"instruction": "two plus two?", "output": "four", "system": "be brief", "history": [["two plus two?", "five"]]},
            conversation(SYSTEM, USER, OTHER, USER, ASSISTANT),
        ),
        ("preference", {"prompt": "two plus two?", "chosen": "four", "rejected": "five"}, PAIR),
        ("preference", {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]}, PAIR),
        ("preference", {"prompt": "two plus two?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]}, PAIR),
        ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "prompt": None}, PAIR),
        (
            "preference",
            {"chosen": [USER, ASSISTANT, USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, OTHER]},
            Pair(
                conversation(USER, ASSISTANT, USER, ASSISTANT, untrained=[0, 1, 2]),
                conversation(USER, ASSISTANT, USER, OTHER, untrained=[0, 1, 2]),
            ),
        ),
        ("kto", {"prompt": "two plus two?", "completion": "four", "label": True}, Labelled(PAIR.chosen, True, 1)),
        ("kto", {"prompt": [USER], "completion": [OTHER], "label": False}, Labelled(PAIR.rejected, False, 1)),
    ],
)
def test_a_record_becomes_what_it_says(format, record, expected):
    assert FORMATS[format].convert(record) == expected


def chat(*turns, **keys):
    return {"messages": list(turns)} | keys


def calling(**call):
    return {"role": "assistant", "content": None, "tool_calls": [call]}


REFUSED = [
    (
        "text",
        {"txt": "a"},
        Reason.MISSING_KEY,
        r"`text` is missing \(found: `txt`\); did you mean `txt`\? .*`fields: {text: txt}`",
    ),
    ("text", {"body": "a"}, Reason.MISSING_KEY, r"\(found: `body`\); add it"),
    ("text", {"text": None}, Reason.NULL_CONTENT, "`text` is null"),
    ("text", {"text": 3}, Reason.WRONG_TYPE, "`text` is a number"),
    ("text", {"text": b"a"}, Reason.WRONG_TYPE, "`text` is of the type bytes"),
    ("text", {"text": "half \ud83d"}, Reason.HALF_PAIR, r"half a surrogate pair \('\\ud83d'\)"),
    ("prompt_response", {"prompt": "a", "response": "b", "completion": "c"}, Reason.TWO_ANSWERS, "both `response` and"),
    ("prompt_response", {"prompt": "a"}, Reason.MISSING_KEY, "the key `response` is missing"),
    ("prompt_response", {"prompt": [USER], "response": "b"}, Reason.WRONG_TYPE, "`prompt` is a list"),
    ("prompt_response", {"prompt": "a", "response": " \n"}, Reason.EMPTY_ANSWER, "message 2, the assistant's, is empty"),
    ("alpaca", {"instruction": "a", "output": True}, Reason.WRONG_TYPE, "`output` is true or false"),
    ("alpaca", {"instruction": "a", "output": ""}, Reason.EMPTY_ANSWER, "is empty"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "c"}, Reason.WRONG_TYPE, "`history` is text"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, Reason.WRONG_TYPE, "`history`, entry 1 is a list"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c", None]]}, Reason.NULL_CONTENT, "entry 1: `answer` is null"),
    ("messages", {"messages": {}}, Reason.WRONG_TYPE, "`messages` is an object"),
    ("messages", {"messages": None}, Reason.NULL_CONTENT, "`messages` is null"),
    ("messages", {"messages": []}, Reason.EMPTY_CONVERSATION, "`messages` is an empty list"),
    ("messages", chat("hello"), Reason.WRONG_TYPE, "message 1 is text"),
    ("messages", chat(USER, {"role": "assistant"}), Reason.MISSING_KEY, "message 2: the key `content` is missing"),
    ("messages", chat(USER, {"role": "assistant", "content": None}), Reason.NULL_CONTENT, "message 2: `content` is null"),
    ("messages", chat(USER, {**ASSISTANT, "weight": 0}), Reason.UNKNOWN_KEY, "message 2 has the key `weight`; only `role`, "),
    ("messages", chat(USER, {**ASSISTANT, "train": "no"}), Reason.WRONG_TYPE, "message 2: `train` is text"),
    (
        "messages",
        chat({**USER, "train": True}, ASSISTANT),
        Reason.TRAINED_PROMPT,
        "message 1 is the user's and has `train: true`",
    ),
    ("messages", chat({"role": "human", "content": "a"}, ASSISTANT), Reason.UNKNOWN_ROLE, "message 1 has the role 'human'"),
    ("messages", chat(SYSTEM, USER), Reason.NO_ASSISTANT, "no assistant turn"),
    ("messages", chat(USER, USER, ASSISTANT), Reason.ROLES_OUT_OF_ORDER, "message 2 has the role 'user' where 'assistant'"),
    ("messages", chat(ASSISTANT, USER), Reason.ROLES_OUT_OF_ORDER, "message 1 has the role 'assistant' where 'user'"),
    ("messages", chat(USER, SYSTEM, ASSISTANT), Reason.ROLES_OUT_OF_ORDER, "message 2 has the role 'system' where 'assistant'"),
    ("messages", chat(SYSTEM, SYSTEM, USER, ASSISTANT), Reason.ROLES_OUT_OF_ORDER, "message 2 has the role 'system'"),
    ("messages", chat(USER, ASSISTANT, USER), Reason.ROLES_OUT_OF_ORDER, "the last message is the user's"),
    ("messages", chat(USER, CALL, RESULT), Reason.ROLES_OUT_OF_ORDER, "the last message is the tool's"),
    ("messages", chat(USER, CALL, ASSISTANT), Reason.ROLES_OUT_OF_ORDER, "message 3 has the role 'assistant' where 'tool'"),
    ("messages", chat(USER, RESULT, ASSISTANT), Reason.TOOL_WITHOUT_CALL, "message 2 is a tool's result, but no call"),
    ("messages", chat(USER, CALL, RESULT, RESULT, ASSISTANT), Reason.TOOL_WITHOUT_CALL, "message 4 is a tool's result"),
    ("messages", chat(USER, CALL, {**RESULT, "tool_call_id": "y"}, ASSISTANT), Reason.TOOL_WITHOUT_CALL, "the call 'y'"),
    ("messages", chat({**USER, "tool_calls": CALL["tool_calls"]}, ASSISTANT), Reason.INVALID_TOOL_CALL, "only the assistant"),
    ("messages", chat(USER, {**CALL, "tool_calls": "add"}), Reason.WRONG_TYPE, "`tool_calls` is text"),
    ("messages", chat(USER, calling(name="add", arguments={})), Reason.INVALID_TOOL_CALL, "call 1 is no call of a function"),
    ("messages", chat(USER, calling(type="code", function=ADD)), Reason.INVALID_TOOL_CALL, "call 1 is no call of a function"),
    ("messages", chat(USER, calling(function={"name": "add", "arguments": "{"})), Reason.INVALID_TOOL_CALL, "not valid JSON"),
    ("messages", chat(USER, calling(function={"name": "add", "arguments": "[]"})), Reason.INVALID_TOOL_CALL, "an empty list"),
    ("messages", chat(USER, calling(function={"arguments": {}})), Reason.MISSING_KEY, "the key `name` is missing"),
    ("messages", chat(USER, calling(function={"name": "f", "arguments": {"a": b""}})), Reason.WRONG_TYPE, "written as JSON"),
    ("messages", chat(USER, calling(function={"name": "f", "arguments": {"a": "\ud83d"}})), Reason.HALF_PAIR, "`arguments`"),
    ("messages", chat(USER, ASSISTANT, tools="add"), Reason.INVALID_TOOL, "`tools` is text that is not valid JSON"),
    ("messages", chat(USER, ASSISTANT, tools={}), Reason.INVALID_TOOL, "`tools` is an object"),
    ("messages", chat(USER, ASSISTANT, tools=[{"type": "function"}]), Reason.INVALID_TOOL, "tool 1 has no name"),
    ("messages", chat({**USER, "content": [{"type": "image_url", "url": "a"}]}, ASSISTANT), Reason.NOT_TEXT, "'image_url'"),
    ("messages", chat({**USER, "content": ["a"]}, ASSISTANT), Reason.WRONG_TYPE, "message 1, part 1 is text"),
    ("sharegpt", {"conversations": []}, Reason.EMPTY_CONVERSATION, "`conversations` is an empty list"),
    ("sharegpt", {"conversation": [HUMAN, GPT]}, Reason.MISSING_KEY, "did you mean `conversation`"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "bing", "value": "a"}]}, Reason.UNKNOWN_ROLE, "message 2 is from 'bing'"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": None}]}, Reason.NULL_CONTENT, "message 2: `value` is null"),
    ("sharegpt", {"conversations": [HUMAN, {**GPT, "weight": 1}]}, Reason.UNKNOWN_KEY, "message 2 has the key `weight`"),
    ("sharegpt", {"conversations": [GPT, HUMAN]}, Reason.ROLES_OUT_OF_ORDER, "message 1 has the role 'assistant'"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "function_call", "value": "add(2)"}]}, Reason.INVALID_TOOL_CALL, "JSON"),
    ("preference", {"prompt": "a", "chosen": "b"}, Reason.MISSING_KEY, "`rejected` is missing"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, Reason.NULL_CONTENT, "`rejected` is null"),
    ("preference", {"chosen": "b", "rejected": "c"}, Reason.MISSING_KEY, "`prompt` is missing"),
    ("preference", {"prompt": " ", "chosen": "b", "rejected": "c"}, Reason.EMPTY_PROMPT, "`prompt` is empty"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, Reason.EQUAL_ANSWERS, "are equal"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, Reason.WRONG_TYPE, "`margin` is text; it"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, Reason.WRONG_TYPE, "is true or false"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.nan}, Reason.WRONG_TYPE, "`margin` is nan"),
    ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, Reason.EQUAL_ANSWERS, "are equal"),
    ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, Reason.EMPTY_ANSWER, "message 2, the assistant's, is empty"),
    ("preference", {"prompt": [USER], "chosen": [USER], "rejected": "b"}, Reason.EMPTY_ANSWER, "`chosen` is empty"),
    ("preference", {"chosen": [SYSTEM, USER, ASSISTANT], "rejected": [USER, OTHER]}, Reason.EMPTY_PROMPT, "different messages"),
    ("preference", {"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": "b"}, Reason.OTHER_PROMPT, "`chosen` begins with"),
    (
        "preference",
        {"chosen": [USER, ASSISTANT, USER, OTHER], "rejected": [USER, ASSISTANT, {**USER, "content": "b"}, OTHER]},
        Reason.OTHER_PROMPT,
        "`chosen` leaves the prompt with the user's",
    ),
    ("kto", {"prompt": "a", "completion": "b", "label": 1}, Reason.WRONG_TYPE, "`label` is a number"),
    ("kto", {"prompt": "a", "completion": "b"}, Reason.MISSING_KEY, "`label` is missing"),
    ("kto", {"prompt": "", "completion": "b", "label": True}, Reason.EMPTY_PROMPT, "`prompt` is empty"),
    ("kto", {"prompt": "a", "completion": "", "label": True}, Reason.EMPTY_ANSWER, "is empty"),
]


@pytest.mark.parametrize(("format", "record", "reason", "what"), REFUSED)
def test_a_record_that_does_not_fit_is_refused_with_the_reason(format, record, reason, what):
    with pytest.raises(BadRecordError, match=what) as caught:
        FORMATS[format].convert(record)
    assert caught.value.reason == reason


def test_every_reason_a_format_can_give_is_tested():
    of_templates = {  # and of the tokens
        Reason.PROMPT_TOO_LONG,
        Reason.TEMPLATE_REFUSES,
        Reason.TEMPLATE_DROPS,
        Reason.TEMPLATE_WITHOUT_TOOLS,
        Reason.AMBIGUOUS_MASK,
        Reason.NOTHING_TRAINED,
        Reason.CONTROL_TEXT,
    }
    assert {reason for *_, reason, _ in REFUSED} == set(Reason) - of_templates


STRUCTURES = [None, True, 3, 1.5, "", "a", b"a", [], {}, [[]], [None], ["a"], [3], [{}], {"a": 1}, [{"role": "user"}]]
STRUCTURES += [[{"role": role, "content": "a"}] for role in ("system", "user", "tool", "assistant", 3, None)]
STRUCTURES += [[USER, value] for value in (None, [], "a", USER, SYSTEM, RESULT, {**ASSISTANT, "content": 3})]
STRUCTURES += [[HUMAN], [HUMAN, HUMAN], [HUMAN, {"from": 3, "value": "a"}]]


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("text", "tokens")])
@pytest.mark.parametrize("value", STRUCTURES, ids=repr)
def test_any_structure_under_any_key_is_read_or_refused_but_never_cast(format, value):
    good = {
        "messages": chat(USER, ASSISTANT),
        "sharegpt": {"conversations": [HUMAN, GPT]},
        "prompt_response": {"prompt": "a", "response": "b"},
        "alpaca": {"instruction": "a", "output": "b"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "kto": {"prompt": "a", "completion": "b", "label": True},
    }[format]
    for key in FORMATS[format].keys:
        try:
            sample = FORMATS[format].convert(good | {key: value})
        except BadRecordError:
            continue
        assert "None" not in repr(sample).replace("tools=None", "")


@pytest.mark.parametrize(
    ("keys", "formats"),
    [
        ({"text", "url"}, ["text"]),
        ({"messages"}, ["messages"]),
        ({"messages", "prompt", "prompt_id", "tools"}, ["messages"]),
        ({"conversations", "system", "tools"}, ["sharegpt"]),
        ({"prompt", "completion"}, ["prompt_response"]),
        ({"instruction", "output"}, ["alpaca"]),
        ({"instruction", "input", "output", "text"}, ["text", "alpaca"]),
        ({"chosen", "rejected"}, ["preference"]),
        ({"prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen"}, ["preference"]),
        ({"prompt", "completion", "label"}, ["kto"]),
        ({"prompt", "response", "label"}, ["prompt_response"]),
        ({"prompt"}, []),
        ({"question", "answer"}, []),
        (set(), []),
    ],
)
def test_a_format_is_known_by_its_keys(keys, formats):
    assert fitting_formats(keys) == formats


def test_check_knows_which_formats_a_stage_trains_on():
    assert FORMATS_OF.keys() == NUMBERS.keys()
    for stage, formats in FORMATS_OF.items():
        assert set(formats) == {name for name, rule in FORMATS.items() if rule.stage == records_of(stage)}
