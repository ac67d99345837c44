"""How fast files become tokens on disk, beside a batched `datasets.map` with the same tokenizer and chat template.

Texts and conversations are made from the documentation that ships with Python (scripts/make_corpus.py), the tokenizer is a
byte-level BPE of 8,000 trained on it. Ours is all of `prepare_rows`: read, check every record, tokenise, mask, write,
pack. Theirs is `load_dataset("json")` and a `map` in batches of 1000 that calls the tokenizer, or `apply_chat_template`
with `return_assistant_tokens_mask=True`; the `map` is also timed by itself. Every run is a process of its own that has
imported everything before the clock starts. Tokens/s per core are tokens by the CPU time of all processes, the starting of
workers included (about a second of CPU time for each of ours, whatever the size of the data, here 20 MB). Checked in every
run: tokens, ends of documents and masks are equal, all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, SCRATCH, cpu_seconds, finish, goal, in_child, parse_arguments, versions

FOLDER = SCRATCH / "tokenise"
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 8000
STAGE = {"texts": "pretrain", "conversations": "sft"}


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        what, *rest = arguments.child
        print(json.dumps({"ours": ours, "theirs": theirs, "start": start, "alone": alone}[what](*rest)))
        return
    repeats = 1 if arguments.quick else 3
    folder = make_corpus(quick=arguments.quick)
    rows: list[list[Any]] = []
    disk: list[list[Any]] = []
    goals = []
    for kind in STAGE:
        for workers in (1, 2):
            found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []} | ({"alone": []} if workers == 1 else {})
            for _ in range(repeats):
                for who, results in found.items():
                    results.append(in_child(__file__, who, folder, kind, *([] if who == "alone" else [workers])))
            mine, other = found["ours"], found["theirs"]
            tokens = mine[0]["tokens"]
            assert all(each["digest"] == mine[0]["digest"] for each in mine + other), f"{kind}: tokens or masks differ"

            def speed(results: list[dict[str, Any]], key: str, tokens: int = tokens) -> float:
                return float(tokens / statistics.median(each[key] for each in results) / 1e6)

            base = speed(other, "cpu_s")
            for name, results, cpu, wall in (
                ("ours, prepare_rows", mine, "cpu_s", "wall_s"),
                ("load_dataset + map", other, "cpu_s", "wall_s"),
                ("map alone", other, "map_cpu_s", "map_wall_s"),
            ):
                rows.append([kind, workers, name, speed(results, cpu), speed(results, cpu) / base, speed(results, wall)])
            against = f"{kind}, {workers} process{'es' if workers > 1 else ''}: ours against "
            ratio = speed(mine, "cpu_s") / base
            strict = speed(mine, "cpu_s") / speed(other, "map_cpu_s")
            goals.append(goal(against + "load_dataset + map", 1.25, ratio, "times", at_least=True))
            goals.append(goal(against + "map alone", 1.25, strict, "times", at_least=True))
            if workers == 1:
                single = speed(mine, "wall_s")
                sizes = [mine[0]["tokens_bin"], mine[0]["store"], mine[0]["rows"], other[0]["disk"]]
                disk.append([kind, tokens, *(size / tokens for size in sizes)])
                goals.append(goal(f"{kind}: tokens on disk", 2, mine[0]["tokens_bin"] / tokens, "bytes/token"))
                pure, name = found["alone"], "ours, ChunkTokenizer alone"
                rows.append([kind, 1, name, speed(pure, "cpu_s"), speed(pure, "cpu_s") / base, speed(pure, "wall_s")])
            else:
                rows[-3].append(speed(mine, "wall_s") / single)
    for row in rows:
        row += [None] * (7 - len(row))
    documents = 10**4 if arguments.quick else 10**6
    many = make_many(folder, documents)
    shutil.rmtree(folder / "starts", ignore_errors=True)
    first = in_child(__file__, "start", folder, many)
    starts = [in_child(__file__, "start", folder, many) for _ in range(5)]
    assert all(each["fingerprint"] == first["fingerprint"] and each["documents"] == documents for each in starts)
    again = statistics.median(each["wall_s"] for each in starts) * 1e3
    goals.append(goal(f"second start on {documents:,} documents", 50, again, "ms"))
    tables = [
        {
            "title": "From JSON lines to tokens on disk",
            "columns": ["data", "processes", "who", "Mtok/s a core", "load + map = 1", "Mtok/s, wall", "1 process = 1, wall"],
            "rows": rows,
        },
        {
            "title": "Bytes on disk for each token",
            "columns": ["data", "tokens", "our tokens", "all of our store", "our rows", "the files of datasets"],
            "rows": disk,
        },
        {
            "title": f"prepare_rows on {documents:,} documents, the median of new processes",
            "columns": ["start", "ms, wall"],
            "rows": [["first", first["wall_s"] * 1e3], ["second", again]],
        },
    ]
    packages = versions("tokenizers", "transformers", "datasets", "pyarrow")
    finish("tokenise", quick=arguments.quick, goals=goals, tables=tables, packages=packages)


# -- data ---------------------------------------------------------------------------------------------------------------


def make_corpus(*, quick: bool) -> Path:
    """texts.jsonl, conversations.jsonl and a tokenizer."""
    folder = FOLDER / ("quick" if quick else "whole")
    if (folder / "ready").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    source = SCRATCH / "corpus"
    subprocess.run([sys.executable, str(ROOT / "scripts" / "make_corpus.py"), str(source)], check=True)
    folder.mkdir(parents=True)
    texts = [json.loads(line)["text"] for line in (source / "train.jsonl").open(encoding="utf-8")]
    pairs = [json.loads(line) for line in (source / "pairs_train.jsonl").open(encoding="utf-8")]
    train_tokenizer(texts, folder / "tokenizer")
    draw = random.Random(0)
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    size = 0
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        while size < (2 if quick else 20) * 10**6:
            text = "\n\n".join(draw.choices(paragraphs, k=draw.randint(1, 30)))
            size += file.write(json.dumps({"text": text}) + "\n")
    with (folder / "conversations.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(2000 if quick else 20_000):
            turns = [{"role": "system", "content": "You explain Python."}] if draw.random() < 0.5 else []
            for pair in draw.choices(pairs, k=draw.randint(1, 4)):
                turns.append({"role": "user", "content": pair["prompt"].strip()})
                turns.append({"role": "assistant", "content": pair["response"].strip()})
            file.write(json.dumps({"messages": turns}) + "\n")
    (folder / "ready").touch()
    return folder


def train_tokenizer(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ds_trainer.data.templates import TEMPLATES

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, TURN, TURN_END]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder)


def make_many(folder: Path, count: int) -> Path:
    path = folder / "many.jsonl"
    if not path.exists():
        words = ["again", "before", "finds", "it", "made", "none", "of", "reads", "start", "that", "what"]
        draw = random.Random(1)
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                file.write(json.dumps({"text": f"{number} " + " ".join(draw.choices(words, k=8))}) + "\n")
        time.sleep(2.5)  # a file as young as this is read again at every start
    return path


# -- each in a process of its own ---------------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    tokenizer("warm")
    return tokenizer


def prepared(path: Path, stage: Any, tokenizer: Any, cache: Path, workers: int) -> Any:
    from ds_trainer.arguments.schema import DataSection, Source
    from ds_trainer.data.prepare import prepare_rows

    sources = [Source(path=str(path))]
    data = DataSection(sources=sources, seq_len=2048)
    return prepare_rows(
        data,
        sources,
        stage,
        tokenizer,
        seq_len=2048,
        cache_folder=cache,
        report=lambda text: None,
        workers=workers,
        show=lambda share, text: None,
    )


def ours(folder: str, kind: str, workers: str) -> dict[str, Any]:
    import ds_trainer.data.prepare  # noqa: F401

    tokenizer = load_tokenizer(folder)
    cache = Path(folder, "ours")
    shutil.rmtree(cache, ignore_errors=True)
    wall, cpu = time.perf_counter(), cpu_seconds()
    rows = prepared(Path(folder, f"{kind}.jsonl"), STAGE[kind], tokenizer, cache, int(workers))
    result = {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}
    store = rows.pools[0].stores[0]
    return result | {
        "digest": digest(np.fromfile(store.folder / "tokens.bin", store.dtype), store.lengths, trained_in(store)),
        "tokens": store.meta["tokens"],
        "tokens_bin": (store.folder / "tokens.bin").stat().st_size,
        "store": size_of(store.folder),
        "rows": sum(size_of(each) for each in cache.glob("rows_*") if each.is_dir()),
    }


def alone(folder: str, kind: str) -> dict[str, float]:
    """The chunks are read before; parsing them is part of what a worker does."""
    from ds_trainer.arguments.schema import DataSection, Source
    from ds_trainer.data.prepare import recipes_of
    from ds_trainer.data.readers import read_chunks
    from ds_trainer.data.sources import find_sources
    from ds_trainer.data.tokenize import ChunkTokenizer

    tokenizer = load_tokenizer(folder)
    sources = [Source(path=str(Path(folder, f"{kind}.jsonl")))]
    stage: Any = STAGE[kind]
    found = find_sources(sources, stage, lambda text: None)
    (recipe,) = recipes_of(found, DataSection(sources=sources, seq_len=2048), stage, tokenizer, lambda text: None)
    chunks = list(read_chunks(found[0]))
    tokenize = ChunkTokenizer(recipe)
    wall, cpu = time.perf_counter(), cpu_seconds()
    for chunk in chunks:
        tokenize(chunk)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_seconds() - cpu}


def theirs(folder: str, kind: str, workers: str) -> dict[str, Any]:
    cache = Path(folder, "theirs")
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = load_tokenizer(folder)
    import datasets
    import pyarrow.compute

    datasets.disable_progress_bars()
    wall, cpu = time.perf_counter(), cpu_seconds()
    map_wall, map_cpu, mapped = mapped_dataset(datasets, Path(folder), kind, tokenizer, cache, int(workers))
    result = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": cpu_seconds() - cpu,
        "map_wall_s": map_wall,
        "map_cpu_s": map_cpu,
        "disk": sum(Path(each["filename"]).stat().st_size for each in mapped.cache_files),
    }
    table = mapped.data.table.combine_chunks()
    tokens = table["input_ids"].combine_chunks().flatten().to_numpy()
    lengths = pyarrow.compute.list_value_length(table["input_ids"]).to_numpy()
    trained = np.ones(len(tokens), np.bool_)
    if kind == "conversations":
        trained = table["assistant_masks"].combine_chunks().flatten().to_numpy()
    return result | {"tokens": len(tokens), "digest": digest(tokens, lengths, trained)}


def mapped_dataset(datasets: Any, folder: Path, kind: str, tokenizer: Any, cache: Path, workers: int) -> Any:
    loaded = datasets.load_dataset("json", data_files=str(folder / f"{kind}.jsonl"), split="train", cache_dir=str(cache))
    end = tokenizer.eos_token_id

    def texts(batch: Any) -> dict[str, Any]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*each, end] for each in ids]}

    def conversations(batch: Any) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    run = {"texts": texts, "conversations": conversations}[kind]
    wall, cpu = time.perf_counter(), cpu_seconds()
    mapped = loaded.map(
        run, batched=True, batch_size=1000, num_proc=workers if workers > 1 else None, remove_columns=loaded.column_names
    )
    return time.perf_counter() - wall, cpu_seconds() - cpu, mapped


def start(folder: str, path: str) -> dict[str, Any]:
    import ds_trainer.data.prepare  # noqa: F401

    tokenizer = load_tokenizer(folder)
    wall = time.perf_counter()
    rows = prepared(Path(path), "pretrain", tokenizer, Path(folder, "starts"), 2)
    took = time.perf_counter() - wall
    return {"wall_s": took, "fingerprint": rows.fingerprint, "documents": rows.pools[0].stores[0].num_documents}


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def digest(tokens: Any, lengths: Any, trained: Any) -> str:
    """Of all tokens, where the documents end, and which tokens are trained: equal if all of them are."""
    found = hashlib.sha256()
    for values in (np.asarray(tokens, np.uint16), np.asarray(lengths, np.int32), np.asarray(trained, np.bool_)):
        found.update(np.ascontiguousarray(values).data)
    return found.hexdigest()


def trained_in(store: Any) -> Any:
    """(num_tokens,) bool."""
    every = np.arange(store.num_documents)
    spans, counts = store.spans_of(every)
    edges = np.zeros(store.meta["tokens"] + 1, np.int8)
    first, end = (spans + np.repeat(store.first_tokens(every), counts)[:, None]).T
    np.add.at(edges, first, 1)
    np.add.at(edges, end, -1)
    return np.cumsum(edges[:-1], dtype=np.int8)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
