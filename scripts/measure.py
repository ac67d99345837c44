"""Measure what the project promises, and write docs/measured.md. Takes about ten minutes on two CPU cores.

    python scripts/measure.py            everything
    python scripts/measure.py --no-offload   without the runs that compile DeepSpeed ops
    python scripts/measure.py --only loss    one section anew; the rest of the page stays

Uses the workers of tests/ranks, so that the figures and the tests cannot drift apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "out" / "measure"
MIB = 2**20
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ranks"), str(ROOT / "tests" / "unit" / "objectives")]


def run(*arguments: str, cwd: Path = ROOT) -> str:
    """Run a command to its end and return what it printed; its errors end the script."""
    print("+", " ".join(arguments), flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\nfailed with {done.returncode}")
    return done.stdout


def torchrun(ranks: int, *arguments: str) -> str:
    return run("torchrun", "--nproc-per-node", str(ranks), *arguments)


def update_parity() -> Iterator[str]:
    import torch
    from test_update_parity import CASES, WORKER, plain_update

    folder = fresh("parity")
    for ranks in (1, 2):
        torchrun(ranks, str(WORKER), str(folder))
    plain = plain_update()
    yield "## The update is that of one plain torch process"
    yield ""
    yield (
        "Three steps on ragged packed rows, fp32, AdamW, clipping on; largest difference of any weight and of any loss from "
        "one process that feeds each document alone through transformers' own logits and steps torch's AdamW."
    )
    yield ""
    yield "| ZeRO stage | ranks | accumulation | weights | losses |"
    yield "|---|---|---|---|---|"
    for stage, ranks, accumulation in CASES:
        result = torch.load(folder / f"stage{stage}_ranks{ranks}_accumulation{accumulation}.pt")
        scores = ("losses", "grad_norm")
        weights = max((result[name] - plain[name]).abs().max().item() for name in plain if name not in scores)
        losses = (result["losses"] - plain["losses"]).abs().max().item()
        yield f"| {stage} | {ranks} | {accumulation} | {weights:.1e} | {losses:.1e} |"


def chunked_loss() -> Iterator[str]:
    from test_objectives_chunked_head import PEAK

    yield "## The logits are never whole in memory"
    yield ""
    yield "Head and loss of 4096 targets, vocabulary 32768, hidden size 64, fp32: the logits alone would be 512 MiB."
    yield ""
    yield "| loss | peak memory of forward and backward |"
    yield "|---|---|"
    for how in ("plain", "chunked"):
        yield f"| {how} | {float(run(sys.executable, '-c', PEAK, how)):.0f} MiB |"


def loading_memory() -> Iterator[str]:
    from test_load_memory import WORKER, save_model

    folder = fresh("loading")
    save_model(folder / "model")
    whole = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) / MIB
    yield "## Under ZeRO-3 no rank holds the whole model"
    yield ""
    yield (
        f"A model of {whole:.0f} MiB on two ranks, so {whole / 2:.0f} MiB a rank: the most a rank holds above the start while "
        "the model is constructed and its weights are loaded or drawn, and the pages of the files it has mapped beside that "
        "(the system drops those when it needs memory)."
    )
    yield ""
    yield "| weights | rank 0 | rank 1 | mapped by rank 0 | mapped by rank 1 |"
    yield "|---|---|---|---|---|"
    names = {
        "sharded": "from safetensors, each rank its slices (ours)",
        "scratch": "initial weights (ours)",
        "transformers": "from safetensors, through transformers",
    }
    for how, words in names.items():
        torchrun(2, str(WORKER), how, str(folder / "model"), str(folder))
        ranks = [json.loads((folder / f"{how}_rank{rank}.json").read_text()) for rank in (0, 1)]
        figures = [rank[name] / MIB for name in ("private_bytes", "mapped_bytes") for rank in ranks]
        yield f"| {words} | " + " | ".join(f"{figure:.0f} MiB" for figure in figures) + " |"


def resume(offload: bool) -> Iterator[str]:
    import torch
    from helpers import metrics
    from test_resume import states

    folder = fresh("resume")
    run(sys.executable, "scripts/make_corpus.py", "out/quickstart/corpus")
    small = ["train.max_steps=6", "train.global_batch_size=4", "train.micro_batch_size=1", "checkpoint.every_steps=3"]
    small += [
        "checkpoint.keep_last=5",
        "monitor.log_every_steps=1",
        "evaluate.max_rows=4",
        f"data.cache_folder={folder / 'cache'}",
    ]
    pretrain = ["--config", "examples/quickstart_pretrain.yaml", *small, "train.warmup_steps=2"]
    cases = {
        f"pretraining, {name}": [*pretrain, "--deepspeed", f"ds_configs/{name}.json"] for name in ("zero1", "zero2", "zero3")
    }
    if offload:
        for name in ("zero2_offload", "zero3_offload"):
            cases[f"pretraining, {name}"] = [*pretrain, "--deepspeed", f"ds_configs/{name}.json"]
    sft = ["--config", "examples/quickstart_sft.yaml", *small, f"model.path={folder / 'base'}", "train.warmup_steps=2"]
    for name in ("zero2", "zero3"):
        cases[f"LoRA with dropout, {name}"] = [*sft, "--deepspeed", f"ds_configs/{name}.json", "adapter.lora.dropout=0.1"]

    yield "## A resumed run is the uninterrupted run"
    yield ""
    yield (
        "Two ranks, fp32, six steps; again from the checkpoint after three. Equal means: the losses of steps 4 to 6 as bits, "
        "and every parameter's weights and optimizer states in the last checkpoint as bits."
    )
    yield ""
    yield "| run | losses | tensors of the checkpoint |"
    yield "|---|---|---|"
    for index, (name, arguments) in enumerate(cases.items()):
        whole, again = folder / f"whole{index}", folder / f"again{index}"
        torchrun(2, "-m", "ds_trainer", "train", *arguments, f"checkpoint.folder={whole}")
        if index == 0:
            run("ds_trainer", "export", "--run", str(whole), "--to", str(folder / "base"))
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "step_00000006")
        torchrun(2, "-m", "ds_trainer", "train", *arguments, f"checkpoint.folder={again}")
        losses = [[line["loss"].hex() for line in metrics(each)][-3:] for each in (whole, again)]
        tensors = [states(each / "checkpoints" / "step_00000006") for each in (whole, again)]
        equal = sum(torch.equal(tensors[0][where], tensors[1][where]) for where in tensors[0])
        yield (f"| {name} | {'equal' if losses[0] == losses[1] else 'DIFFERENT'} | {equal} of {len(tensors[0])} equal |")


def fresh(name: str) -> Path:
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-offload", action="store_true", help="leave out the runs that compile DeepSpeed ops")
    parser.add_argument("--only", choices=["parity", "loss", "loading", "resume"], help="measure one section anew")
    arguments = parser.parse_args()
    parts = {
        "parity": update_parity,
        "loss": chunked_loss,
        "loading": loading_memory,
        "resume": lambda: resume(offload=not arguments.no_offload),
    }
    page = ROOT / "docs" / "measured.md"
    if arguments.only:
        title, *lines = parts[arguments.only]()
        before, _, rest = page.read_text(encoding="utf-8").partition(title)
        after = rest.partition("\n\n## ")
        page.write_text(before + "\n".join([title, *lines]) + ("".join(after[1:]) or "\n"), encoding="utf-8")
        return
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "peft"))
    lines = [
        "# What was measured",
        "",
        "Written by `python scripts/measure.py`; run it to get the figures of your machine. The tests in `tests/ranks` and",
        "`tests/unit` hold the same figures to limits.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.system()}, Python {platform.python_version()}, {packages}, "
        f"{os.cpu_count()} CPU cores, no GPU.",
    ]
    for part in parts.values():
        lines += ["", *part()]
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("wrote docs/measured.md")


if __name__ == "__main__":
    main()
