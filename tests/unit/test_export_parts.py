"""An export of all weights never holds more of them in memory than one of its files does."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY_LLAMA

from ds_trainer import export
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.checkpoint.keep import Keep
from ds_trainer.checkpoint.manager import Found
from ds_trainer.checkpoint.saver import write_checkpoint
from ds_trainer.checkpoint.slices import SliceReader
from ds_trainer.errors import ModelError
from ds_trainer.model.tokenizer import load_tokenizer


@pytest.fixture
def trained(corpus, tmp_path):
    """A checkpoint of a model with random weights, each in two slices, and its settings."""
    settings = RunSettings.model_validate(
        {
            "model": {"config": {**TINY_LLAMA, "tie_word_embeddings": True}, "tokenizer": str(corpus / "tokenizer")},
            "data": {"sources": [{"path": "x"}], "seq_len": 8},
            "train": {"stage": "pretrain"},
            "checkpoint": {"folder": "o"},
        }
    )
    tokenizer = load_tokenizer(settings.model)
    model = export.empty_model(settings, tokenizer, "fp32")
    slices = {}
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        slices |= {(name, "fp32", 0): flat[:7], (name, "fp32", 7): flat[7:]}
    saved = write_checkpoint(tmp_path / "checkpoints", 1, slices, {}, Keep(last=1))
    return Found(saved.path, {"files": {"rank_00000.safetensors": {}}}), settings, tokenizer, model.state_dict()


@pytest.mark.parametrize(("part_bytes", "files"), [(1 << 30, 1), (60_000, 3), (1, 21)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_parts_are_the_model(trained, tmp_path, monkeypatch, part_bytes, files, precision):
    from transformers import AutoModelForCausalLM

    found, settings, tokenizer, expected = trained
    monkeypatch.setattr(export, "PART_BYTES", part_bytes if precision == "fp32" else part_bytes // 2 or 1)
    to = tmp_path / "out"
    to.mkdir()
    export.write_in_parts(found, settings, tokenizer, to, precision)
    written = sorted(to.glob("*.safetensors"))
    assert len(written) in (files, files - 1), [path.name for path in written]
    dtype = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision])
    largest = max(value.numel() for value in expected.values()) * dtype.itemsize
    assert all(path.stat().st_size <= max(export.PART_BYTES, largest) + 4096 for path in written)
    model = AutoModelForCausalLM.from_pretrained(to, dtype=dtype)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].to(dtype)), name
    if len(written) > 1:
        index = json.loads((to / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in written}


def test_a_weight_that_is_missing_is_named(trained, tmp_path):
    found, *_ = trained
    reader = SliceReader([found.path / "rank_00000.safetensors"])
    shapes = {"model.norm.weight": torch.Size([32]), "model.other.weight": torch.Size([3])}
    with pytest.raises(ModelError, match=r"1 trained weights are missing or of another size, for example model\.other\.weight"):
        export.require_weights(reader, shapes, found)
