"""Held-out sets with names, the best checkpoint and the end of patience, in real runs."""

from __future__ import annotations

import json

from helpers import run_command, torchrun


def test_a_run_ends_when_its_evaluations_do_not_get_better_and_keeps_the_best(run_file, corpus, tmp_path):
    """Nothing is better by 100: the first evaluation is the best, and two more end the run."""
    texts = [{"path": str(corpus / "texts.jsonl"), "format": "text"}]
    sets = {"all": texts, "few": [{**texts[0], "max_samples": 9}]}
    judged = {"metric": "few/loss", "patience": 2, "min_improvement": 100.0}
    evaluate = {"sets": sets, "every_steps": 1, "max_rows": 4, **judged}
    checkpoint = {"every_steps": 1, "keep_last": 1, "keep_best": 1}
    config = run_file("run", train={"max_steps": 9}, evaluate=evaluate, checkpoint=checkpoint)
    folder = tmp_path / "run"

    def start(*words: str) -> str:
        done = run_command(torchrun(1, "-m", "ds_trainer", "train", "--config", config.name, *words), cwd=tmp_path)
        assert done.code == 0, done.text
        return done.out

    def state() -> tuple[int, list[str]]:
        checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())
        return json.loads((folder / "exit.json").read_text())["step"], checkpoints

    start("train.max_steps=2")
    assert state()[0] == 2
    text = start()
    assert state()[0] == 3, "a resume goes on counting"
    assert "ended by evaluate.patience = 2: few/loss was best at step 1 (" in text
    assert "To train on: evaluate.patience=null" in text
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {(line["step"], line["set"]): line["evaluate_loss"] for line in lines if "set" in line}
    assert found.keys() == {(step, name) for step in (1, 2, 3) for name in sets}
    best = min((1, 2, 3), key=lambda step: found[step, "few"])
    assert (folder / "checkpoints" / "best").read_text() == f"step_{best:08d}"
    assert state()[1] == sorted({f"step_{best:08d}", "step_00000003"})

    text = start()
    assert state()[0] == 3, "it is over, and stays so"
    assert "\nstep " not in text
    start("evaluate.patience=4")
    assert state()[0] == 5
    exported = run_command(["ds_trainer", "export", "--run", str(folder), "--to", "best", "--checkpoint", "best"], cwd=tmp_path)
    assert exported.code == 0, exported.text
    assert (folder / "checkpoints" / "best").read_text() in exported.out


def test_what_the_model_writes_is_what_its_export_writes_and_training_does_not_notice(run_file, corpus, tmp_path):
    prompts = ["a", "the answer to every question is", "one two"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": each}) + "\n" for each in prompts))
    held_out = {"sources": [{"path": str(corpus / "texts.jsonl"), "format": "text"}], "every_steps": 2, "max_rows": 4}
    generate = {"prompts": "prompts.jsonl", "max_new_tokens": 7}
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    run_file("silent", evaluate=held_out, deepspeed=zero3)
    run_file("writing", evaluate={**held_out, "generate": generate}, deepspeed=zero3)
    losses = {}
    for name in ("silent", "writing"):
        done = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", f"{name}.yaml"), cwd=tmp_path)
        assert done.code == 0, done.text
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line.get("loss", line.get("evaluate_loss")) for line in lines]
    assert len(losses["silent"]) == 6
    assert losses["silent"] == losses["writing"], "to the last bit"
    assert done.out.count("the model completes\n") == 2

    events = [json.loads(line) for line in (tmp_path / "writing" / "events.jsonl").read_text().splitlines()]
    found = [each for each in events if each["event"] == "generated"]
    assert [(each["step"], each["line"]) for each in found] == [(step, line) for step in (2, 4) for line in (1, 2, 3)]
    exported = run_command(["ds_trainer", "export", "--run", "writing", "--to", "model"], cwd=tmp_path)
    assert exported.code == 0, exported.text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (each.from_pretrained(tmp_path / "model") for each in (AutoModelForCausalLM, AutoTokenizer))
    for prompt, each in zip(prompts, found[3:], strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = model.generate(ids, max_new_tokens=7, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert each["completion"] == tokenizer.decode(new, skip_special_tokens=True)
        assert each["tokens"] == len(new)
        assert each["ended"] == (new[-1].item() == tokenizer.eos_token_id)
