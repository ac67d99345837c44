"""How well `ds_trainer plan` foretells the memory of a rank: real runs of two ranks beside their plans.

Every run trains four steps through torchrun and saves after two, so that its last steps hold everything a run ever holds. On
the CPU the resident memory of the process is compared (VmHWM, of the rank that held most), on GPUs what torch allocated; both
as the run wrote them to metrics.jsonl. The first row trains next to nothing: it is the constant that every CPU plan has in it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SCRATCH, child_environment, finish, goal, versions
from helpers import write_corpus, write_run

from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.memory import CPU_PROCESS, CUDA_CONTEXT
from ds_trainer.plan.story import Plan, Request, make_plan

RANKS = 2
GIB = 2**30
ZERO = "deepspeed.zero_optimization."
OFFLOAD = (f"{ZERO}offload_optimizer={{device: cpu}}", "deepspeed.optimizer={type: AdamW, params: {torch_adam: true}}")
"""torch's Adam, so that nothing has to be compiled; it holds the same as DeepSpeed's."""
LORA = ("adapter.lora.rank=16",)
QLORA = (*LORA, "model.quantize=nf4")
CHECKPOINTING = ("model.gradient_checkpointing=true",)


def llama(hidden: int, intermediate: int, layers: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    heads = max(1, hidden // 64)
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


MODELS = {
    "tiny": llama(64, 128, 2, 320),
    "67 M": llama(768, 2048, 6, 16000),
    "170 M": llama(2048, 5632, 3, 4000),
    "119 M": llama(1024, 2816, 8, 8000),
}


@dataclass(frozen=True)
class Case:
    """A run."""

    model: str
    stage: int
    precision: str = "fp32"
    words: str = ""
    settings: tuple[str, ...] = ()
    micro: int = 1
    accumulation: int = 1
    seq_len: int = 256


CASES = [
    *(Case("67 M", stage) for stage in (1, 2, 3)),
    Case("67 M", 1, words="2 micro-steps", accumulation=2),
    Case("67 M", 2, words="2 micro-steps", accumulation=2),
    Case("67 M", 2, words="optimizer on cpu", settings=OFFLOAD),
    Case("67 M", 3, words="optimizer and weights on cpu", settings=(*OFFLOAD, f"{ZERO}offload_param={{device: cpu}}")),
    Case("67 M", 2, words="LoRA", settings=LORA),
    Case("67 M", 3, words="LoRA", settings=LORA),
    Case("67 M", 2, words="4 x 1024 positions", micro=4, seq_len=1024),
    Case("67 M", 2, words="4 x 1024 positions, checkpointing", micro=4, seq_len=1024, settings=CHECKPOINTING),
    Case("67 M", 3, words="4 x 1024 positions, checkpointing", micro=4, seq_len=1024, settings=CHECKPOINTING),
    *(Case("170 M", stage, "bf16") for stage in (1, 2, 3)),
    Case("170 M", 2, "fp32"),
    Case("170 M", 2, "bf16", words="optimizer on cpu", settings=OFFLOAD),
    Case("170 M", 3, "bf16", words="optimizer on cpu", settings=OFFLOAD),
    Case("170 M", 3, "bf16", words="LoRA", settings=LORA),
    Case("170 M", 2, "bf16", words="2 x 1024 positions, checkpointing", micro=2, seq_len=1024, settings=CHECKPOINTING),
    *(Case("170 M", stage, "bf16", words="QLoRA", settings=QLORA) for stage in (2, 3)),
    # Planned and written down before they were measured, once; no rule of the plan was changed after that.
    Case("119 M", 3, words="2 x 768 positions, checkpointing", micro=2, seq_len=768, settings=CHECKPOINTING),
    Case(
        "119 M",
        3,
        "bf16",
        words="2 x 1024 positions, LoRA, checkpointing",
        micro=2,
        seq_len=1024,
        settings=(*LORA, *CHECKPOINTING),
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the process and ZeRO-2 at 67 M only; writes no results")
    parser.add_argument(
        "--replan", action="store_true", help="plan anew beside what the last whole run measured: after a change of the plan"
    )
    parser.add_argument("--only", help="cases whose line has this text in it; writes no results")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    rows, errors = [], []
    last = {tuple(row[:3]): row[5] * GIB for row in last_rows()} if arguments.replan else {}
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        write_corpus(corpus)
        write_texts(corpus / "texts.jsonl")
        base = CPU_PROCESS if last else measured(Case("tiny", 2), corpus, Path(scratch), on_gpu)[1]
        print(
            f"a rank that trains next to nothing: {base / 2**20:.0f} MiB, the plan counts {CPU_PROCESS / 2**20:.0f}", flush=True
        )
        for case in chosen(arguments.quick, arguments.only):
            what = f"ZeRO-{case.stage}" + (f", {case.words}" if case.words else "")
            plan, found = measured(case, corpus, Path(scratch), on_gpu, last.get((case.model, case.precision, what)))
            phase, foretold = plan.memory.peak("device")
            foretold -= CUDA_CONTEXT if on_gpu else 0
            error = 100 * (foretold / found - 1)
            errors.append(error)
            rows.append([case.model, case.precision, what, phase, foretold / GIB, found / GIB, f"{error:+.1f}%"])
            print(rows[-1], flush=True)
    what = "allocated GPU memory" if on_gpu else "resident memory"
    quick = arguments.quick or arguments.only is not None
    finish(
        "plan_accuracy",
        quick=quick,
        goals=[goal("a plan's peak beside the run's, furthest off", 10.0, max(map(abs, errors)), "%")],
        tables=[
            {
                "title": f"The most a rank holds, two ranks, {what}, GiB",
                "columns": ["parameters", "precision", "how", "when, by the plan", "predicted", "measured", "off by"],
                "rows": rows,
            }
        ],
        notes=[
            f"Of each CPU figure, {CPU_PROCESS / 2**20:.0f} MiB is the process without a model"
            + ("; measured by an earlier run, planned anew." if last else f"; measured here: {base / 2**20:.0f} MiB.")
        ],
        packages=versions("torch", "deepspeed", "transformers", "peft"),
    )


def chosen(quick: bool, only: str | None) -> Iterator[Case]:
    for case in CASES:
        if (not quick or case == Case("67 M", 2)) and (only is None or only in repr(case)):
            yield case


def write_texts(path: Path) -> None:
    """Enough documents to fill rows of 1024 positions without padding to speak of."""
    words = [
        "the",
        "model",
        "reads",
        "a",
        "row",
        "of",
        "tokens",
        "and",
        "predicts",
        "the",
        "next",
        "one",
        "from",
        "all",
        "before",
        "it",
    ]
    texts = [" ".join(words[(i * 7 + j) % len(words)] for j in range(20 + i * 11 % 90)) for i in range(1500)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def saved_model(name: str, scratch: Path) -> Path:
    """A folder with a model of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = scratch / "base" / name.replace(" ", "")
    if not folder.exists():
        fields = dict(MODELS[name])
        AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).save_pretrained(folder)
    return folder


def last_rows() -> list[list[Any]]:
    rows: list[list[Any]] = json.loads((RESULTS / "plan_accuracy.json").read_text(encoding="utf-8"))["tables"][0]["rows"]
    return rows


def measured(case: Case, corpus: Path, scratch: Path, on_gpu: bool, known: float | None = None) -> tuple[Plan, float]:
    """The plan of a run, and the most that one of its ranks held, in bytes; it is not run where that is known."""
    folder = scratch / "run"
    # Training an adapter on random weights is refused, so these are written and read.
    base = {"path": str(saved_model(case.model, scratch))} if LORA[0] in case.settings else {"config": MODELS[case.model]}
    config = write_run(
        corpus,
        scratch,
        model={**base, "tokenizer": str(corpus / "tokenizer")},
        data={"seq_len": case.seq_len, "cache_folder": str(scratch / "cache")},
        train={
            "max_steps": 4,
            "micro_batch_size": case.micro,
            "gradient_accumulation_steps": case.accumulation,
            "global_batch_size": None,
            "precision": case.precision,
            "learning_rate": 1e-4,
            "collective_timeout_seconds": 300,
            "hang_timeout_seconds": 290,
        },
        deepspeed={"zero_optimization": {"stage": case.stage}},
        checkpoint={"folder": str(folder), "every_steps": 2, "keep_last": 1},
    )
    json_path = Path(__file__).parents[2] / "ds_configs" / f"zero{case.stage}.json"
    plan = make_plan(
        Request(
            config=config,
            deepspeed=json_path,
            overrides=case.settings,
            cluster=Cluster(nodes=1, ranks_per_node=RANKS, device_type="cuda" if on_gpu else "cpu"),
        )
    )
    if known is not None:
        return plan, known
    command = ["torchrun", "--nproc-per-node", str(RANKS), "-m", "ds_trainer", "train", "--config", str(config)]
    command += ["--deepspeed", str(json_path), *case.settings]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return plan, max(line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line) * GIB


if __name__ == "__main__":
    main()
