"""What several test folders share: launching ranks with a time limit, and reading what a run wrote."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@dataclass
class Done:
    """How a launched command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what launchers leave, for one thread a process on the CPU."""
    marks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in marks and not name.startswith(("SLURM_", "OMPI_", "PMI", "ACCELERATE_", "TORCHELASTIC_"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **extra}


def run_command(arguments: list[str], *, cwd: Path, timeout: float = 180, env: dict[str, str] | None = None) -> Done:
    """Run a command in a session of its own; when its time is up, everything it started is killed."""
    process = subprocess.Popen(
        arguments,
        cwd=cwd,
        env=env or clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(arguments)} did not end within {timeout} s\n{out[-3000:]}\n{err[-3000:]}")
    return Done(process.returncode, out, err)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The torchrun command for a module (`-m`, name, ...) or a script."""
    return ["torchrun", "--nproc-per-node", str(ranks), *arguments]


TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that belong to training steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def write_corpus(folder: Path) -> None:
    """Fill a folder with a tokenizer, 60 texts of very different length, 40 conversations, 40 pairs, 80 labelled answers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

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
    pairs = [
        {
            "prompt": f"say {words[i % len(words)]}",
            "chosen": " ".join(words[i % 5 : i % 5 + 3 + i % 4]),
            "rejected": " ".join(reversed(words[i % 7 : i % 7 + 2 + i % 5])),
        }
        for i in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(each) + "\n" for each in labelled))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder / "tokenizer")


def write_base(corpus: Path, folder: Path) -> Path:
    """Write a folder with a small pretrained model, always the same, and the tokenizer of the corpus; returns it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    fields = dict(TINY_LLAMA)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)
    return folder


def write_run(corpus: Path, folder: Path, name: str = "run", **sections: dict[str, Any] | None) -> Path:
    """Write a small run file into a folder; keyword arguments replace or extend its sections."""
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
        "checkpoint": {"folder": str(folder / name)},
        "monitor": {"log_every_steps": 1},
    }
    for section, values in sections.items():
        if values is None:
            del run[section]
        elif section in run and section != "model":
            run[section] = {**run[section], **values}
        else:
            run[section] = values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
