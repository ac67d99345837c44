"""What is wrong with the input is said once, with its place and what to write instead, and nothing half-made is left."""

import json
import shutil
from pathlib import Path

import pytest
from forks import Command, run_all
from helpers import TINY_LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def models(folder, corpus) -> Path:
    """Models with something wrong: no_tokenizer, broken, small_vocabulary, incomplete; and one that is right."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    right = folder / "models" / "right"
    config = LlamaConfig(**{key: value for key, value in TINY_LLAMA.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config).save_pretrained(right)
    shutil.copytree(right, right.with_name("no_tokenizer"))
    for path in (corpus / "tokenizer").iterdir():
        shutil.copy(path, right)
    for name in ("broken", "incomplete"):
        shutil.copytree(right, right.with_name(name))
    (right.with_name("broken") / "config.json").write_text('{"model_type": "llama",')
    weights = right.with_name("incomplete") / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    return right.parent


DATA = {
    "empty": b"",
    "not_utf8": b'{"text": "one"}\n{"text": "caf\xe9"}\n',
    "not_json": b'{"text": "one"}\n{"text": "two"}\n{"text": "three"\n',
    "other_key": b'{"text": "one"}\n{"body": "two"}\n',
    "wrong_type": b'{"text": 7}\n',
    "filtered": b'{"text": ""}\n{"text": ""}\n',
    "few": b'{"text": "one two"}\n',
}

EXPECTED = {
    "data_missing": ["nowhere.jsonl: matches no file", "relative to the current folder"],
    "data_empty": ["empty.jsonl: the file is empty"],
    "data_not_utf8": ["not_utf8.jsonl:2: byte 14 (0xe9) is not UTF-8"],
    "data_not_json": ["not_json.jsonl:3: not valid JSON (Expecting ',' delimiter, column 17)"],
    "data_other_key": ["other_key.jsonl:2:", "`text`"],
    "data_wrong_type": ["wrong_type.jsonl:1:", "`text`"],
    "data_filtered": ["no record is left to train on, of 2 (2 empty texts)"],
    "data_few": [
        "the data makes 1 rows of 48 positions",
        "needs (4 rows a step",
        "or train.global_batch_size=1 train.micro_batch_size=1.",
    ],
    "data_folder": ["is a folder, but not one that `datasets` saved", "files or globs. Write "],
    "data_wrong_stage": ["format text has no assistant turns", "train.stage=pretrain"],
    "format_of_another_stage": [".yaml:1: a source has the format text, and train.stage = sft trains on messages or "],
    "model_missing": ["model.path = no/such/model: no such folder", "hub id"],
    "model_no_tokenizer": ["no tokenizer could be loaded (the folder holds config.json,", "model.tokenizer"],
    "model_broken_config": [
        "models/broken: no model config could be read",
        "broken/config.json: not valid JSON:",
        "line 1 column 24",
    ],
    "model_small_vocabulary": ["token id", "vocabulary ends at 99", "model.resize_vocabulary: true"],
    "model_short_positions": ["data.seq_len = 4096 is above the model's max_position_embeddings = 128"],
    "model_incomplete": ["models/incomplete: 1 weights of the model are not in the file", "layers.1.mlp.up_proj.weight"],
    "lora_target": ["adapter.lora.target_modules: nothing_like_it matches no linear layer", "q_proj", "all-linear"],
    "folder_under_a_file": ["a_file/run", "cannot be written (Not a directory", "Set checkpoint.folder"],
    "two_ranks_data": ["not_json.jsonl:3: not valid JSON"],
    "two_ranks_model": ["model.path = no/such/model: no such folder"],
    "two_ranks_rows": ["no record is left to train on"],
    "two_ranks_lora": ["nothing_like_it matches no linear layer"],
    "two_ranks_folder": ["cannot be written (Not a directory"],
}


@pytest.fixture(scope="module")
def shown(folder, corpus, models):
    for name, content in DATA.items():
        (folder / f"{name}.jsonl").write_bytes(content)
    (folder / "a_file").write_text("")
    base = {
        "model": {"config": TINY_LLAMA, "tokenizer": str(corpus / "tokenizer")},
        "data": {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "seq_len": 48},
        "train": {"stage": "pretrain", "max_steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
        "checkpoint": {},
    }
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}

    def command(name: str, verb: str = "debug", ranks: int = 1, **sections) -> Command:
        run = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
        if "model" in sections:
            run["model"] = sections["model"]
        run["checkpoint"] = {"folder": str(folder / "runs" / name)} | run["checkpoint"]
        (folder / f"{name}.yaml").write_text(json.dumps(run))
        return Command([verb, "--config", f"{name}.yaml"], ranks)

    def source(name: str) -> dict:
        return {"data": {"sources": [{"path": str(folder / name), "format": "text"}]}}

    small = {"config": {**TINY_LLAMA, "vocab_size": 100}, "tokenizer": str(corpus / "tokenizer")}
    lora = {"adapter": {"lora": {"target_modules": ["nothing_like_it", "q_proj"]}}}
    under_a_file = {"checkpoint": {"folder": str(folder / "a_file" / "run")}, "data": {"cache_folder": str(folder / "cache")}}
    cases = {
        **{f"data_{name}": source(f"{name}.jsonl") for name in DATA},
        "data_missing": source("nowhere.jsonl"),
        "data_folder": source("."),
        "data_wrong_stage": {"data": {"sources": [{"path": str(corpus / "texts.jsonl")}]}, "train": {"stage": "sft"}},
        "format_of_another_stage": {"train": {"stage": "sft"}},
        "model_missing": {"model": {"path": "no/such/model"}},
        "model_no_tokenizer": {"model": {"path": str(models / "no_tokenizer")}},
        "model_broken_config": {"model": {"path": str(models / "broken"), "tokenizer": str(corpus / "tokenizer")}},
        "model_small_vocabulary": {"model": small},
        "model_short_positions": {"data": {"seq_len": 4096}, "train": {"global_batch_size": 1}},
        "model_incomplete": {"model": {"path": str(models / "incomplete")}, **zero3},
        "lora_target": {"model": {"path": str(models / "right")}, **lora},
        "folder_under_a_file": under_a_file,
    }
    commands = {name: command(name, **sections) for name, sections in cases.items()}
    two = {
        "data": source("not_json.jsonl"),
        "model": {"model": {"path": "no/such/model"}},
        "rows": source("filtered.jsonl"),
        "lora": {"model": {"path": str(models / "right")}, **lora, **zero3},
        "folder": under_a_file,
    }
    for name, sections in two.items():
        commands[f"two_ranks_{name}"] = command(f"two_ranks_{name}", "train", 2, **sections)
    assert commands.keys() == EXPECTED.keys()
    return run_all(commands, folder)


def code_of(name: str) -> int:
    return 3 if name.removeprefix("two_ranks_").startswith(("data", "rows")) else 2


@pytest.mark.parametrize("name", EXPECTED)
def test_bad_input_is_refused_with_its_place_and_the_remedy(shown, name):
    done = shown[name]
    said = " ".join(done.text.split())
    for words in EXPECTED[name]:
        assert words in said, done.text
    assert done.codes[0] == code_of(name), done.text
    assert all(done.codes), done.text
    assert "Traceback" not in done.text
    assert "Loading weights" not in done.text
    assert done.text.count("ds_trainer: ") == 1, done.text


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("two_ranks") and name != "two_ranks_folder"])
def test_a_refusal_is_kept_in_the_run_folder(shown, folder, name):
    ended = json.loads((folder / "runs" / name / "exit.json").read_text())
    assert ended["code"] == code_of(name)
    assert EXPECTED[name][0] in ended["reason"]
    assert ended["step"] is None


def test_a_refusal_leaves_no_cache_and_no_checkpoint_that_a_later_start_would_trust(shown, folder):
    cache = folder / "runs" / "data_cache"
    assert not list(cache.glob(".*")), "a half-built folder was left"
    assert all((path / "meta.json").is_file() for path in cache.iterdir() if path.is_dir())
    assert not list((folder / "runs").glob("*/checkpoints/*"))


def test_the_other_rank_does_not_keep_anybody_waiting(shown):
    assert max(each.seconds for name, each in shown.items() if name != "two_ranks_folder") < 20
