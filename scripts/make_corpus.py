"""Make a small real corpus from the documentation that ships with Python: nothing is downloaded.

Writes into the folder: train.jsonl and held_out.jsonl (`text`: the language reference and every documented module of the
standard library), pairs_train.jsonl and pairs_held_out.jsonl (`prompt`, `response`: a signature and what it does),
tokenizer/ (byte-level BPE trained on train.jsonl) and corpus.json with the figures.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_PCT = 5
VOCABULARY = 4096
END = "<|endoftext|>"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "__pycache__"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the standard library that is written in Python, parsed and not imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).with_suffix("")
        if SKIPPED.isdisjoint(name.parts) and not name.parts[0].startswith("config-"):
            try:
                yield ".".join(name.parts).removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Signature and docstring of every documented function and class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{node.name}"
            text = ast.get_docstring(node)
            if text:
                arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
                yield f"{'class' if isinstance(node, ast.ClassDef) else 'def'} {name}{arguments}", text
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{name}.")


def is_held_out(key: str) -> bool:
    """A fixed choice by name, so that the split is the same wherever the corpus is made."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PCT


def write(folder: Path, name: str, records: list[tuple[str, dict[str, str]]]) -> dict[str, list[dict[str, str]]]:
    """Write records, split by the text they come from, so that no held-out pair was read in pretraining."""
    parts = {
        "train": [record for source, record in records if not is_held_out(source)],
        "held_out": [record for source, record in records if is_held_out(source)],
    }
    for part, chosen in parts.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (folder / f"{name}{part}.jsonl").write_text(text, encoding="utf-8")
    return parts


def unigram_entropy(tokenizer, train: list[str], held_out: list[str]) -> float:
    """Nats a held-out token costs a model that knows only how often each token occurs in the training part."""
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(train):
        counts.update(encoding.ids)
    total = sum(counts.values()) + VOCABULARY  # one added to each count: no token is impossible
    ids = [token for encoding in tokenizer.encode_batch(held_out) for token in encoding.ids]
    return -sum(math.log((counts[token] + 1) / total) for token in ids) / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if (folder / "corpus.json").is_file():
        print(f"the corpus is there already: {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)

    texts = [(f"topic {name}", {"text": text.strip()}) for name, text in topics.items()]
    pairs: list[tuple[str, dict[str, str]]] = []
    for module, tree in modules():
        documented = list(definitions(tree))
        head = ast.get_docstring(tree)
        parts = ([f"module {module}\n\n{head}"] if head else []) + [f"{sign}\n{text}" for sign, text in documented]
        if parts:
            texts.append((f"module {module}", {"text": "\n\n".join(parts)}))
        for sign, text in documented:
            answer = text.split("\n\n")[0].replace("\n", " ").strip()
            if 20 <= len(answer) <= 400 and len(sign) <= 200:
                question = f"What does this do in Python's module {module}?\n{sign}"
                pairs.append((f"module {module}", {"prompt": question, "response": answer}))
    split = write(folder, "", texts)
    write(folder, "pairs_", pairs)

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    train, held_out = ([record["text"] for record in split[part]] for part in ("train", "held_out"))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(train, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder / "tokenizer")
    figures = {
        "texts": len(texts),
        "pairs": len(pairs),
        "megabytes": round(sum(len(record["text"].encode()) for _, record in texts) / 1e6, 2),
        "vocabulary": VOCABULARY,
        "unigram_entropy_nats": round(unigram_entropy(bpe, train, held_out), 4),
    }
    (folder / "corpus.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"made {folder}: {figures}")


if __name__ == "__main__":
    main()
