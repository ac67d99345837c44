"""Prompts to complete: read with the template of the training data, or refused with path and line."""

from __future__ import annotations

import json

import pytest

from ds_trainer.data.prompts import read_prompts
from ds_trainer.data.render import effective_chat_template
from ds_trainer.errors import DataError


def test_a_prompt_is_what_the_template_writes_before_an_answer(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "four?"}]
    path.write_text("\n".join(json.dumps({"prompt": each}) for each in ("two?", messages, "never read")) + "\n")
    template = effective_chat_template(tokenizer, "plain")
    first, second = read_prompts(str(path), tokenizer, template=template, limit=2, room=99)
    assert (first.line, second.line) == (1, 2)
    assert "two?" in first.text
    assert first.text.rstrip().endswith("assistant:")
    assert second.text.index("be brief") < second.text.index("four?")
    assert tokenizer.decode(list(first.ids)) == first.text
    plain = read_prompts(str(path), tokenizer, template=None, limit=1, room=99)
    assert plain[0].text == "two?"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", ":2: not valid JSON"),
        ("[1]", ":2: must be an object"),
        ('{"text": "a"}', ":2: the key `prompt` is missing"),
        ('{"prompt": " "}', ":2: `prompt` is empty"),
        ('{"prompt": 3}', ":2: `prompt` is"),
        ('{"prompt": "' + "word " * 99 + '"}', r":2: has [\d,]+ tokens, and there is room for 1 to 60"),
        ('{"prompt": "a </s> b"}', ":2: holds the text of a control token"),
    ],
)
def test_what_cannot_be_completed_is_named_by_its_line(tokenizer, tmp_path, line, why):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    template = effective_chat_template(tokenizer, "plain")
    with pytest.raises(DataError, match=f"evaluate.generate.prompts: {path}{why}"):
        read_prompts(str(path), tokenizer, template=template, limit=9, room=60)


def test_a_file_that_is_not_there_or_empty_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl cannot be read: No such file"):
        read_prompts(str(tmp_path / "nowhere.jsonl"), tokenizer, template=None, limit=9, room=60)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no record"):
        read_prompts(str(tmp_path / "empty.jsonl"), tokenizer, template=None, limit=9, room=60)
    (tmp_path / "list.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(DataError, match=r"must be a text where train\.stage = pretrain"):
        read_prompts(str(tmp_path / "list.jsonl"), tokenizer, template=None, limit=9, room=60)
