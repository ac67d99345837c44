"""Make a small real corpus from the documentation that ships with Python: nothing is downloaded.

Writes into the folder: train.jsonl and held_out.jsonl (`text`: the language reference and every documented module of the
standard library), pairs_train.jsonl and pairs_held_out.jsonl (`prompt`, `response`: a signature and what it does),
preferences_train.jsonl and preferences_held_out.jsonl (`prompt`, `chosen`, `rejected`: the right answer, and one to another
question), feedback_train.jsonl and feedback_held_out.jsonl (`prompt`, `completion`, `label`: one of the two answers and whether
it is right), tokenizer/ (byte-level BPE trained on train.jsonl) and corpus.json with the figures.
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
NAMES_A_THING = {"a", "an", "the", "this", "base", "abstract", "class", "mix-in", "mixin", "simple", "generic"}
"""How an answer begins that says what something is, and not what it does."""
TIMES_A_CLASS = 4
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


def preferences(pairs: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Questions with their own answer and that of another question: of a class for a function, and the other way round.

    Only answers in the usual form are taken (a function does something, a class is something), and the other one is from the
    same part of the split, from another module.
    """
    kinds: dict[tuple[bool, bool], list[tuple[str, dict[str, str]]]] = {}
    for source, pair in pairs:
        of_class = pair["prompt"].split("\n")[1].startswith("class ")
        if of_class == (pair["response"].split()[0].lower() in NAMES_A_THING):
            kinds.setdefault((is_held_out(source), of_class), []).append((source, pair))
    found = []
    for (held_out, of_class), own in kinds.items():
        others = kinds.get((held_out, not of_class), [])
        # Few classes are documented: each is asked of several times, and as many functions: no kind is the better guess.
        number = TIMES_A_CLASS * min(len(own), len(others))
        order = sorted(
            (
                (hashlib.sha256(f"{n} {pair['prompt']}".encode()).hexdigest(), source, pair)
                for source, pair in own
                for n in range(TIMES_A_CLASS if of_class else 1)
            ),
            key=lambda each: each[0],
        )
        for key, source, pair in order[:number]:
            other_source, other = others[int(key, 16) % len(others)]
            if other_source != source:
                found.append((source, {"prompt": pair["prompt"], "chosen": pair["response"], "rejected": other["response"]}))
    return found


def feedback(preferred: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, object]]]:
    """One answer of every pair, with a label: of every second one the right answer, of the others the wrong one."""
    found: list[tuple[str, dict[str, object]]] = []
    for number, (source, pair) in enumerate(preferred):
        label = number % 2 == 0
        completion = pair["chosen" if label else "rejected"]
        found.append((source, {"prompt": pair["prompt"], "completion": completion, "label": label}))
    return found


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
    if (folder / "corpus.json").is_file() and (folder / "feedback_train.jsonl").is_file():
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
    preferred = preferences(pairs)
    write(folder, "preferences_", preferred)
    write(folder, "feedback_", feedback(preferred))

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
        "preferences": len(preferred),
        "megabytes": round(sum(len(record["text"].encode()) for _, record in texts) / 1e6, 2),
        "vocabulary": VOCABULARY,
        "unigram_entropy_nats": round(unigram_entropy(bpe, train, held_out), 4),
    }
    (folder / "corpus.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"made {folder}: {figures}")


if __name__ == "__main__":
    main()
