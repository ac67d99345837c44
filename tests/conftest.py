"""Fixtures that several test folders share: a small corpus and run files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TINY_LLAMA


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, 60 texts of very different length, and 40 conversations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("corpus")
    sentence = "the model reads a row of tokens and predicts the next one from all before it"
    words = sentence.split()
    texts = [" ".join(words[(i * 7 + j) % len(words)] for j in range(3 + i * 11 % 60)) for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"say {words[i % len(words)]}"},
                {"role": "assistant", "content": " ".join(words[i % 5 : i % 5 + 3 + i % 9])},
            ]
        }
        for i in range(40)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def run_file(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a small run file into tmp_path; keyword arguments replace or extend its sections."""

    def write(name: str = "run", **sections: dict[str, Any] | None) -> Path:
        run: dict[str, Any] = {
            "model": {"config": TINY_LLAMA, "tokenizer": str(corpus / "tokenizer")},
            "data": {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "seq_len": 48},
            "train": {
                "stage": "pretrain",
                "max_steps": 4,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "learning_rate": 0.01,
                "schedule": "constant",
                "precision": "fp32",
                "collective_timeout_seconds": 60,
                "hang_timeout_seconds": 50,
            },
            "deepspeed": {"zero_optimization": {"stage": 2}},
            "checkpoint": {"folder": str(tmp_path / name)},
            "monitor": {"log_every_steps": 1},
        }
        for section, values in sections.items():
            if values is None:
                del run[section]
            elif section in run and section != "model":
                run[section] = {**run[section], **values}
            else:
                run[section] = values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    return write
