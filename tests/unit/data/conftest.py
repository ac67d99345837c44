import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The answer is four, and the question was two plus two.",
    "Paris is the capital of France; Rome is the capital of Italy.",
    "user: assistant: system: hello world, how are you today?",
    "Repeat after me: the answer is four.",
]
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

Write = Callable[..., Path]


def build_tokenizer(*, adds_bos: bool = False, **special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's and Llama 3's, trained in milliseconds; offsets are trimmed as theirs are."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 10, trainer)
    trim = processors.ByteLevel(trim_offsets=True)
    add_bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = processors.Sequence([trim, add_bos]) if adds_bos else trim
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(eos_token="</s>")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file under tmp_path: JSON lines from objects, or the very bytes or text given."""

    def write_file(name: str, *lines: dict[str, Any] | str, raw: bytes | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(text.encode() if raw is None else raw)
        return path

    return write_file


@pytest.fixture
def reports() -> list[str]:
    """Lines that were reported to the user: pass `reports.append`."""
    return []


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer
