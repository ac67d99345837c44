import pytest

from ds_trainer.data.formats import FORMATS, BadRecordError, fitting_formats

USER = {"role": "user", "content": "two plus two?"}
ASSISTANT = {"role": "assistant", "content": "four"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("format", "record", "expected"),
    [
        ("text", {"text": "once", "id": 3}, "once"),
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": None}]}, [USER, ASSISTANT]),
        ("prompt_response", {"prompt": "two plus two?", "response": "four"}, [USER, ASSISTANT]),
        ("prompt_response", {"prompt": "two plus two?", "completion": "four"}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "two plus two?", "output": "four"}, [USER, ASSISTANT]),
        ("alpaca", {"instruction": "two plus two?", "input": "", "output": "four"}, [USER, ASSISTANT]),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2 2", "output": "four"},
            [{"role": "user", "content": "Add.\n\n2 2"}, ASSISTANT],
        ),
    ],
)
def test_a_record_becomes_what_it_says(format, record, expected):
    assert FORMATS[format].convert(record) == expected


@pytest.mark.parametrize(
    ("format", "record", "reason"),
    [
        ("text", {"txt": "a"}, r"the key `text` is missing \(found: `txt`\)"),
        ("text", {"text": None}, "`text` is null"),
        ("text", {"text": 3}, "`text` is a number"),
        ("text", {"text": "half \ud83d"}, r"half a surrogate pair \('\\ud83d'\)"),
        ("prompt_response", {"prompt": "a", "response": "b", "completion": "c"}, "both `response` and `completion`"),
        ("prompt_response", {"prompt": "a"}, "the key `response` is missing"),
        ("prompt_response", {"prompt": [USER], "response": "b"}, "`prompt` is a list"),
        ("alpaca", {"instruction": "a", "output": True}, "`output` is true or false"),
        ("alpaca", {"instruction": "a", "input": None, "output": "b"}, "`input` is null"),
        ("messages", {"messages": {}}, "`messages` is an object"),
        ("messages", {"messages": []}, "`messages` is an empty list"),
        ("messages", {"messages": ["hello"]}, "message 1 is text"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "message 2: the key `content` is missing"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: `content` is null"),
        ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": []}]}, "message 2 has the key `tool_calls`"),
        ("messages", {"messages": [{"role": "human", "content": "a"}, ASSISTANT]}, "message 1 has the role 'human'"),
        ("messages", {"messages": [SYSTEM, USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, USER, ASSISTANT]}, "message 2 has the role 'user' where 'assistant'"),
        ("messages", {"messages": [ASSISTANT, USER]}, "message 1 has the role 'assistant' where 'user'"),
        ("messages", {"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 has the role 'system' where 'assistant'"),
        ("messages", {"messages": [USER, ASSISTANT, USER]}, "the last message is the user's"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_the_reason(format, record, reason):
    with pytest.raises(BadRecordError, match=reason):
        FORMATS[format].convert(record)


@pytest.mark.parametrize(
    ("keys", "formats"),
    [
        ({"text", "url"}, ["text"]),
        ({"messages"}, ["messages"]),
        ({"prompt", "completion"}, ["prompt_response"]),
        ({"instruction", "output"}, ["alpaca"]),
        ({"instruction", "input", "output", "text"}, ["text", "alpaca"]),
        ({"prompt"}, []),
        ({"question", "answer"}, []),
    ],
)
def test_a_format_is_known_by_its_keys(keys, formats):
    assert fitting_formats(keys) == formats
