#!/usr/bin/env bash
# From nothing to a trained model on real text, with nothing to download but Python packages:
# corpus and tokenizer, pretraining (ZeRO-2), fine-tuning with LoRA (ZeRO-3), export, a completion.
# Safe to run again: what is done is kept, and a run that was interrupted goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ensure_environment

out=out/quickstart
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus > 0 ? (gpus < 2 ? gpus : 2) : 2))
# One thread a process on the CPU; the launcher would say so in a long warning otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
settings=()
if [ "$gpus" -gt 0 ]; then settings=(train.precision=bf16); fi

step() { printf '\n== %s\n' "$*"; }
train() { # run folder, options...: nothing to do for a run that has ended well
    if grep -qs '"code": 0' "$1/exit.json"; then echo "trained already: $1"; return; fi
    torchrun --nproc-per-node "$ranks" -m ds_trainer train "${@:2}" "${settings[@]}"
}
export_model() { # run folder, options...
    if [ -d "$1/export" ]; then echo "exported already: $1/export"; else ds_trainer export --run "$1" --to "$1/export" "${@:2}"; fi
}

step "1/5 a corpus from the documentation that ships with Python, and a tokenizer trained on it"
python scripts/make_corpus.py $out/corpus

step "2/5 pretraining a small Llama from scratch: torchrun, $ranks processes, ZeRO-2"
train $out/pretrain --config examples/quickstart_pretrain.yaml
export_model $out/pretrain

step "3/5 fine-tuning it with LoRA on questions and answers: $ranks processes, ZeRO-3"
train $out/sft --config examples/quickstart_sft.yaml

step "4/5 export: base and adapter as one Hugging Face model"
export_model $out/sft --merge

step "5/5 a completion by plain transformers, and what was learned"
python scripts/show_quickstart.py $out
