"""One contender of peers_sft.py: train in this process with one trainer, and take a turn whenever the parent gives one.

It runs on the interpreter of the contender, so it imports nothing of this project unless the contender is this project. The
meter stands in the same two places in every trainer: after a forward and backward, where the tokens are counted, and after
an optimizer step, where the process stands still until its next turn. So what is measured is the whole of a step as
the trainer runs it: data, collation, forward, backward, update, logging.

    peers_child.py JOB.json READ_FD WRITE_FD

On WRITE_FD it says a JSON object a line: what the first step was, that it has warmed up, then what each turn was. A turn is a
line on READ_FD, the number of its steps.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Meter:
    """Counts tokens and seconds of one process, and keeps it waiting between its turns."""

    def __init__(self, job: dict[str, Any], read: int, write: int) -> None:
        self.job = job
        self.engine = ""
        """Class of what moves the weights, and the ZeRO stage it says it has."""
        self._asked = os.fdopen(read)
        self._answers = os.fdopen(write, "w", buffering=1)
        self._steps = self._tokens = self._positions = 0
        self._warm_up: int = job["warm_up"]
        self._first: dict[str, Any] | None = {}
        self._limit = 0
        self._cpu = self._wall = 0.0

    def computed(self, input_ids: Any, loss: Any) -> None:
        """Take in one forward and backward.

        Args:
            input_ids: (rows, positions) int64, padding included.
            loss: the mean over the targets of the step, a scalar.
        """
        self._tokens += int((input_ids != self.job["pad_id"]).sum())
        self._positions += input_ids.numel()
        if self._first is not None:
            self._first.setdefault("loss", 0.0)
            self._first["loss"] += float(loss)
            rows = self._first.setdefault("rows", [])
            rows += [[token for token in row if token != self.job["pad_id"]] for row in input_ids.tolist()]

    def step_ended(self) -> None:
        """Take in one optimizer step; between two turns this returns when the next one begins."""
        self._steps += 1
        if self._first is not None:
            self._say(
                self._first | {"cpu_s": cpu_seconds(), "wall_s": time.time() - self.job["spawned"], "engine": self.engine}
            )
            self._first = None
        if self._warm_up > 0:
            self._warm_up -= 1
            if self._warm_up:
                return
            self._say({"ready": True})
        elif self._steps < self._limit:
            return
        else:
            self._say(
                {
                    "steps": self._steps,
                    "tokens": self._tokens,
                    "positions": self._positions,
                    "cpu_s": cpu_seconds() - self._cpu,
                    "wall_s": time.perf_counter() - self._wall,
                    "peak_rss": peak_rss(),
                }
            )
        steps = self._asked.readline()
        if not steps:
            os._exit(0)  # the parent has seen enough; what the trainer does at its end is not wanted
        self._limit = int(steps)
        self._steps = self._tokens = self._positions = 0
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()

    def _say(self, what: dict[str, Any]) -> None:
        self._answers.write(json.dumps(what) + "\n")


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in both)


def peak_rss() -> int:
    """Bytes that were resident at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise KeyError("VmHWM")


def launched(port: int) -> dict[str, str]:
    """What torchrun leaves in the environment of its only worker; no launcher's own start is measured."""
    one = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "LOCAL_SIZE")
    zero = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    return {
        **dict.fromkeys(one, "1"),
        **dict.fromkeys(zero, "0"),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }


def ours(job: dict[str, Any], meter: Any) -> None:
    """This project, by its own command line."""
    from ds_trainer import cli

    meter_ours(meter)
    cli.main(["train", "--config", job["run_file"], *job["settings"]])


def hf(job: dict[str, Any], meter: Meter) -> None:
    """The Trainer of transformers, as its documentation shows it for conversations."""
    meter_transformers(meter)
    import torch
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    options = dict(job["settings"])
    flatten = options.pop("flatten", False)
    arguments = TrainingArguments(**job["common"], **options)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])

    def tokenised(record: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(
            record["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=job["seq_len"]
        )
        labels = [token if trained else -100 for token, trained in zip(made["input_ids"], made["assistant_masks"], strict=True)]
        return {"input_ids": made["input_ids"], "labels": labels}

    data = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["cache"])
    data = data.map(tokenised, remove_columns=data.column_names)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if flatten:
        model.config.use_cache = False  # with a cache, transformers does not look for documents in a row
    collator = DataCollatorWithFlattening() if flatten else DataCollatorForSeq2Seq(tokenizer)
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, processing_class=tokenizer).train()


def trl(job: dict[str, Any], meter: Meter) -> None:
    """The SFTTrainer of TRL."""
    meter_transformers(meter)
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    data = load_dataset("json", data_files=job["data"], split="train", cache_dir=job["cache"])
    arguments = SFTConfig(
        **job["common"],
        max_length=job["seq_len"],
        assistant_only_loss=True,
        model_init_kwargs={"dtype": "float32"},
        **job["settings"],
    )
    SFTTrainer(model=job["model"], args=arguments, train_dataset=data).train()


def llamafactory(job: dict[str, Any], meter: Meter) -> None:
    """`llamafactory-cli train`, which calls this function with what its YAML holds."""
    os.environ["DISABLE_VERSION_CHECK"] = "1"  # it knows no DeepSpeed after 0.18
    meter_transformers(meter)
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(  # its `chatml` also trains the line break after an answer, which the others do not have
        name="bench",
        format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
        format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
        stop_words=["<|im_end|>"],
        replace_eos=True,
    )
    folder = Path(job["data"]).parent
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "formatting": "sharegpt",
        "file_name": Path(job["data"]).name,
        "columns": {"messages": "messages"},
        "tags": tags,
    }
    (folder / "dataset_info.json").write_text(json.dumps({"bench": described}))
    os.environ["HF_DATASETS_CACHE"] = job["cache"]
    arguments = {
        "model_name_or_path": job["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "bench",
        "dataset_dir": str(folder),
        "template": "bench",
        "cutoff_len": job["seq_len"],
        **job["common"],
        **job["settings"],
    }
    run_exp(arguments)


def axolotl(job: dict[str, Any], meter: Meter) -> None:
    """`axolotl train`, which makes these calls with what its YAML holds."""
    meter_transformers(meter)
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    path = Path(job["common"]["output_dir"]).with_suffix(".yaml")
    dataset = {"path": job["data"], "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
    settings = {
        "base_model": job["model"],
        "chat_template": "tokenizer_default",
        "datasets": [{**dataset, "roles_to_train": ["assistant"], "train_on_eos": "turn"}],
        "sequence_len": job["seq_len"],
        "dataset_prepared_path": str(Path(job["cache"]) / path.stem),
        **job["common"],
        **job["settings"],
    }
    path.write_text(yaml.safe_dump(settings))
    cfg = load_cfg(str(path))
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))


def meter_ours(meter: Any) -> None:
    """Set the meter into the engine of this project."""
    from ds_trainer.engine.wrapper import Engine

    micro_step, end_step = Engine.micro_step, Engine.end_step

    def counted_micro_step(self: Any, batch: Any, num_targets: Any) -> Any:
        loss = micro_step(self, batch, num_targets)
        meter.computed(batch.inputs["input_ids"], loss)
        return loss

    def counted_end_step(self: Any) -> Any:
        outcome = end_step(self)
        meter.engine = engine_of(self._engine)
        meter.step_ended()
        return outcome

    Engine.micro_step, Engine.end_step = counted_micro_step, counted_end_step  # type: ignore[method-assign]


def meter_transformers(meter: Any) -> None:
    """Set the meter into the Trainer of transformers, from which the trainers of the others descend."""
    import deepspeed.ops

    # Compiled at every start on a CPU, for inference alone; ours leaves it out too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from transformers import Trainer, TrainerCallback

    class StepEnds(TrainerCallback):
        def __init__(self, trainer: Any) -> None:
            self.trainer = trainer

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            meter.engine = engine_of(self.trainer.model_wrapped)
            meter.step_ended()

    begin, training_step = Trainer.__init__, Trainer.training_step

    def counted_init(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        self.add_callback(StepEnds(self))

    def counted_step(self: Any, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss = training_step(self, model, inputs, *arguments, **options)
        meter.computed(inputs["input_ids"], loss)
        return loss

    Trainer.__init__, Trainer.training_step = counted_init, counted_step


def engine_of(engine: Any) -> str:
    """Its class, with the ZeRO stage of a DeepSpeed engine."""
    stage = f" ZeRO-{engine.zero_optimization_stage()}" if hasattr(engine, "zero_optimization_stage") else ""
    return type(engine).__name__ + stage


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    meter = Meter(job, int(sys.argv[2]), int(sys.argv[3]))
    {"ours": ours, "hf": hf, "trl": trl, "llamafactory": llamafactory, "axolotl": axolotl}[job["trainer"]](job, meter)


if __name__ == "__main__":  # axolotl starts workers that import this file again
    main()
