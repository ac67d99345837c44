"""Run every stage and every adapter through every launcher, save, resume, verify and export; print what held.

    scripts/quickstart.sh                      makes the corpus and the base model that are used here
    python scripts/every_way.py                all of it: about a minute a row on two CPU cores
    python scripts/every_way.py --only dpo ia3

Each row: two steps on two ranks started by torchrun at ZeRO-3; two more from their checkpoint, by `deepspeed` at ZeRO-2;
one more by `ds_trainer debug`; `verify`; `export`, which compares what it wrote with the training engine; `export --merge`.
The first that fails ends the row with its last words. The rows that were run are written to docs/bench/every_way.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
CORPUS, BASE = ROOT / "out" / "quickstart" / "corpus", ROOT / "out" / "quickstart" / "pretrain" / "export"
WORK = ROOT / "out" / "every_way"
STAGES = ("pretrain", "sft", "dpo", "orpo", "simpo", "kto", "reward")
FILES = {"pretrain": "train", "sft": "pairs_train", "kto": "feedback_train"}
ADAPTERS = {
    "lora": {"lora": {"rank": 8}},
    "rslora": {"lora": {"rank": 8, "rslora": True}},
    "dora": {"lora": {"rank": 8, "dora": True}},
    "lora+": {"lora": {"rank": 8, "learning_rate_ratio": 8.0}},
    "pissa": {"lora": {"rank": 8, "init": "pissa"}},
    "olora": {"lora": {"rank": 8, "init": "olora"}},
    "freeze": {"freeze": {"last_layers": 2}},
    "ia3": {"ia3": {}},
    "vera": {"vera": {"rank": 64}},
    "oft": {"oft": {"block_size": 32}},
    "modules_to_save": {"lora": {"rank": 8, "modules_to_save": ["mlp.down_proj"], "target_modules": ["q_proj", "v_proj"]}},
    "path": {"lora": {"path": str(WORK / "adapter")}},
}
"""The last goes on from what `sft with lora` exported."""
PRECOMPUTED = {"reference": "precomputed"}


@dataclass(frozen=True)
class Case:
    """What a row runs."""

    stage: str
    adapter: dict | None = None
    objective: dict | None = None
    quantize: str | None = None


def run_file(case: Case, folder: Path) -> Path:
    run = {
        "model": {"path": str(BASE), "quantize": case.quantize},
        "data": {"sources": [{"path": str(CORPUS / f"{FILES.get(case.stage, 'preferences_train')}.jsonl")}], "seq_len": 512},
        "train": {
            "stage": case.stage,
            "max_steps": 2,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "precision": "fp32",
        },
        "checkpoint": {"folder": str(folder / "run")},
        "monitor": {"log_every_steps": 1},
        **({"adapter": case.adapter} if case.adapter else {}),
        **({"objective": case.objective} if case.objective else {}),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def commands(case: Case, folder: Path) -> dict[str, list[str]]:
    config = ["--config", str(run_file(case, folder))]
    zero3, zero2 = (["--deepspeed", str(ROOT / "ds_configs" / f"zero{stage}.json")] for stage in (3, 2))
    program = [sys.executable, "-m", "ds_trainer"]
    run = str(folder / "run")
    export = [*program, "export", "--run", run, "--to"]
    found = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "-m", "ds_trainer", "train", *config, *zero3],
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--module", "ds_trainer", "train", *config, *zero2, "train.max_steps=4"],
        "debug": [*program, "debug", *config, *zero2, "train.max_steps=5", "--from", "step_00000004", "--steps", "1"],
        "verify": [*program, "verify", run],
        "export": [*export, str(folder / "export")],
    }
    if case.adapter and "freeze" not in case.adapter:
        found["merge"] = [*export, str(folder / "merged"), "--merge"]
    return found


def row(case: Case) -> dict[str, str]:
    """What each command came to: "yes", or its last words."""
    folder = WORK / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options: dict = {"cwd": WORK, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stdin": subprocess.DEVNULL, "timeout": 300}
    found = {}
    for name, command in commands(case, folder).items():
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        text = done.stdout + done.stderr
        went_on = name != "deepspeed" or "RESUMING from" in text
        if done.returncode == 0 and went_on:
            found[name] = "yes"
            continue
        said = re.findall(r"^ds_trainer: .*(?:\n  .*)*", text, re.MULTILINE)
        found[name] = f"code {done.returncode}: {said[0] if said else text[-1500:]}"
        return found
    if case == Case("sft", ADAPTERS["lora"]):
        shutil.copytree(folder / "export", ADAPTERS["path"]["lora"]["path"], dirs_exist_ok=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*STAGES, *ADAPTERS, "nf4"], default=None)
    only = parser.parse_args().only
    if not BASE.is_dir():
        sys.exit(f"{BASE} is not there; run scripts/quickstart.sh first")
    cases = {stage: Case(stage) for stage in STAGES}
    cases |= {f"{stage} with LoRA": Case(stage, ADAPTERS["lora"]) for stage in STAGES if stage not in ("pretrain", "sft")}
    cases |= {f"sft with {name}": Case("sft", adapter) for name, adapter in ADAPTERS.items()}
    cases |= {f"dpo with {name}": Case("dpo", ADAPTERS[name]) for name in ("pissa", "freeze", "ia3")}
    cases |= {f"{stage} precomputed": Case(stage, objective=PRECOMPUTED) for stage in ("dpo", "kto")}
    quantized = [("sft", "lora"), ("dpo", "lora"), ("reward", "lora"), ("sft", "lora+"), ("sft", "vera"), ("dpo", "path")]
    cases |= {f"{stage} with {name} on nf4": Case(stage, ADAPTERS[name], quantize="nf4") for stage, name in quantized}
    cases["dpo with lora precomputed"] = Case("dpo", ADAPTERS["lora"], PRECOMPUTED)
    chosen = {name: case for name, case in cases.items() if not only or any(word in name.split() for word in only)}
    if any(case.adapter == ADAPTERS["path"] for case in chosen.values()):
        chosen = {"sft with lora": cases["sft with lora"], **chosen}  # whose export they go on from
    rows = {}
    for name, case in chosen.items():
        begun = time.monotonic()
        rows[name] = row(case)
        print(f"{name:26} {time.monotonic() - begun:4.0f} s  {rows[name]}", flush=True)
    shutil.rmtree(WORK, ignore_errors=True)
    failed = [name for name, each in rows.items() if set(each.values()) != {"yes"}]
    path = ROOT / "docs" / "bench" / "every_way.json"
    before = json.loads(path.read_text())["rows"] if only and path.is_file() else {}
    versions = {each: version(each) for each in ("torch", "deepspeed", "transformers", "peft")}
    path.write_text(json.dumps({"versions": versions, "rows": {**before, **rows}}, indent=1) + "\n")
    print(f"{len(rows) - len(failed)} of {len(rows)} rows held" + (f"; not: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
