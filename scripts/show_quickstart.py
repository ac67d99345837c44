"""Load the quickstart's model with plain transformers, complete a prompt, and compare its loss with the unigram entropy."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

MARGIN = 0.5
"""Nats by which the held-out loss must be below the unigram entropy: less would be no clear success."""


def held_out_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["evaluate_loss"] for line in lines if "evaluate_loss" in line][-1]


def main() -> int:
    out = Path(sys.argv[1])
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(out / "sft" / "export")
    model = AutoModelForCausalLM.from_pretrained(out / "sft" / "export")
    question = "What does this do in Python's module os?\ndef makedirs(name, mode=511, exist_ok=False)"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    answer = model.generate(**chat, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"prompt:     {question!r}")
    print(f"completion: {tokenizer.decode(answer[0, chat['input_ids'].shape[1] :], skip_special_tokens=True)!r}")

    entropy = json.loads((out / "corpus" / "corpus.json").read_text(encoding="utf-8"))["unigram_entropy_nats"]
    loss = held_out_loss(out / "pretrain")
    print(f"held-out loss after pretraining: {loss:.3f} nats a token; unigram entropy of the corpus: {entropy:.3f}")
    if not loss < entropy - MARGIN:
        print(f"the loss should be at least {MARGIN} below the entropy: something is wrong", file=sys.stderr)
        return 1
    print(
        f"""
Everything is in {out}: corpus/, pretrain/ and sft/ with metrics.jsonl, checkpoints/ and export/.
Try next:
  source .venv/bin/activate
  ds_trainer check --config examples/quickstart_sft.yaml                       the settings in force, each with its origin
  ds_trainer debug --config examples/quickstart_sft.yaml                       one process, for breakpoints
  torchrun --nproc-per-node 2 -m ds_trainer train --config examples/quickstart_sft.yaml \\
      --deepspeed ds_configs/zero2.json checkpoint.folder=out/quickstart/sft-zero2    another engine for the same run"""
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
