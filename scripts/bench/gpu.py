"""What training costs on a GPU: this project, a hand-written DeepSpeed loop and HF Trainer in the same command.

    scripts/bench/gpu.sh STEP            a step takes under ten minutes
    scripts/bench/gpu.sh STEP --dry      the same code with tiny shapes on a CPU; its figures mean nothing and are not kept

Models are Llama-shaped with random weights, made here; data are random tokens, in rows that are full or by a law of length.
Every contender is a process of its own, so that none finds the memory of another: 10 steps to warm up, then 30 that are
timed by events of the device. The figure is the median step. The hand-written loop computes the same model on the same
batches, so that its first loss must be ours; HF Trainer runs the model as transformers has it.

MFU = flops_per_token x tokens/s / peak. The peak is that of dense bf16 by the data sheet: 989e12 for H100 and H200 (SXM);
others by --peak-tflops. Attention is counted as causal, half of the square.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import CAPACITY, ROOT, SCRATCH, child_environment, finish, goal, lengths_of, versions
from peers_child import engine_of, launched, meter_ours, meter_transformers

FOLDER = SCRATCH / "gpu"
STEP_SECONDS = 540
"""What a step may take; jobs that would begin later are left out, and said."""
GIB = 1 << 30
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""What torch's profiler calls that of which the host waits for the device."""
PEAKS = {"H100": 989e12, "H200": 989e12}
LLAMA = {"model_type": "llama", "max_position_embeddings": 1 << 20, "rope_theta": 500000.0}


def shape(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """The fields of a transformers config."""
    return LLAMA | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


MODELS = {
    "0.5B": shape(896, 24, 4864, 14, 2, 151_936, True),  # as Qwen 2.5 0.5B
    "1B": shape(2048, 16, 8192, 32, 8, 128_256, True),  # as Llama 3.2 1B
    "3B": shape(3072, 28, 8192, 24, 8, 128_256, True),
    "8B": shape(4096, 32, 14_336, 32, 8, 128_256, False),
    "tiny": shape(64, 2, 128, 4, 2, 512, True),
}


def flops_per_token(config: Mapping[str, Any], seq_len: int, causal: bool = True, frozen: bool = False) -> float:
    """Floating-point operations of forward and backward for one token of a row that is one document.

    6 for each parameter that is multiplied with (the input embedding is not, the head is), and 12 x layers x hidden x seq_len
    for attention; half of that where it is causal. A frozen base has no gradients of weights: 4 instead of 6.

    Source: Chowdhery et al. 2022, "PaLM", appendix B. Recomputed activations do not count.
    """
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config["intermediate_size"]
    multiplied = layers * layer + hidden * config["vocab_size"]
    return (4 if frozen else 6) * multiplied + 12 * layers * hidden * seq_len * (0.5 if causal else 1.0)


# -- one process, one contender -----------------------------------------------------------------------------------------


class Clock:
    """Times the steps of one process without waiting for the device, writes what it found, and ends the process."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        import torch

        self.job = job
        self.engine = ""
        self._torch = torch
        self._cuda = torch.cuda.is_available() and not job["dry"]
        self._marks: list[Any] = []
        self._tokens: list[Any] = []
        self._here: Any = 0
        self._positions = 0
        self._first_loss: Any = 0.0
        self._profiler: Any = None

    def computed(self, input_ids: Any, loss: Any) -> None:
        """Take in one forward and backward; the padding is token 0."""
        self._here = self._here + (input_ids != 0).sum()
        self._positions += input_ids.numel()
        if not self._marks:
            self._first_loss = self._first_loss + loss.detach()

    def step_ended(self) -> None:
        warm, timed = self.job["warm"], self.job["timed"]
        self._marks.append(self._now())
        self._tokens.append(self._here)
        self._here = 0
        steps = len(self._marks)
        if steps == warm and self._cuda:
            self._torch.cuda.reset_peak_memory_stats()
        if steps < warm + timed:
            return
        if not self.job.get("profiled"):
            self._write({})
        if self._profiler is None:
            kinds = [self._torch.profiler.ProfilerActivity.CPU]
            kinds += [self._torch.profiler.ProfilerActivity.CUDA] if self._cuda else []
            self._profiler = self._torch.profiler.profile(activities=kinds)
            self._profiler.__enter__()
        elif steps == warm + timed + self.job["profiled"]:
            self._profiler.__exit__(None, None, None)
            found, count = self._profiler.key_averages(), self.job["profiled"]
            counted = {each.key: each.count for each in found}
            kernels = [each for each in found if each.device_type != self._torch.autograd.DeviceType.CPU]
            kernels = sorted(kernels, key=lambda each: -each.self_device_time_total)[:15]
            self._write(
                {
                    "waits": {name: counted.get(name, 0) / count for name in WAITS},
                    "kernels": [
                        [each.key[:90], each.self_device_time_total / 1000 / count, each.count / count] for each in kernels
                    ],
                }
            )

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _write(self, more: Mapping[str, Any]) -> None:
        warm, timed = self.job["warm"], self.job["timed"]
        marks = self._marks[: warm + timed]
        if self._cuda:
            self._torch.cuda.synchronize()
            ms = [begin.elapsed_time(end) for begin, end in zip(marks[warm - 1 :], marks[warm:], strict=False)]
            peak = self._torch.cuda.max_memory_allocated()
        else:
            ms = [1000 * (end - begin) for begin, end in zip(marks[warm - 1 :], marks[warm:], strict=False)]
            peak = 0
        tokens = [int(each) for each in self._tokens[warm : warm + timed]]
        found = {
            "ms": statistics.median(ms),
            "ms_all": sum(ms),
            "tokens": sum(tokens),
            "positions": self._positions / len(self._marks) * len(tokens),
            "loss": float(self._first_loss),
            "peak_bytes": peak,
            "engine": self.engine,
        }
        Path(self.job["answer"]).write_text(json.dumps(found | dict(more)))
        os._exit(0)


def child_ours(job: dict[str, Any], clock: Clock) -> None:
    from ds_trainer import cli

    meter_ours(clock)
    cli.main(["train", "--config", job["run_file"]])


def child_bare(job: dict[str, Any], clock: Clock) -> None:
    """`deepspeed.initialize` and the loop that its documentation shows, on batches that are on the device already."""
    import deepspeed
    import torch

    from ds_trainer import assemble, comm
    from ds_trainer.arguments.merge import resolve
    from ds_trainer.engine.build import sharded_construction
    from ds_trainer.engine.optim import parameter_groups
    from ds_trainer.launch.detect import detect_launch
    from ds_trainer.model import attention, load
    from ds_trainer.model.adapter import add_adapter, base_of
    from ds_trainer.objectives import language_model
    from ds_trainer.state import TrainState

    launch = detect_launch(dict(os.environ))
    prepared = assemble.prepare(resolve(Path(job["run_file"])), launch, print)
    settings, config = prepared.resolved.settings, prepared.engine_config.config
    with comm.process_group(prepared.device, rank=0, world_size=1, timeout_seconds=600):
        attention.register_document_attention()
        with sharded_construction(config):
            model = assemble.construct(prepared, print)
            load.finish_model(
                model, tokens=0, resize=False, gradient_checkpointing=settings.model.gradient_checkpointing, seed=0
            )
            if settings.adapter:
                model = add_adapter(model, settings.adapter, settings.train.seed)
        language_model.attach(base_of(model), chunked=settings.model.chunked_loss)
        groups = parameter_groups(model, settings.train)
        options: dict[str, Any] = {"lr": settings.train.learning_rate, "betas": tuple(settings.train.betas)}
        if job["cpu_adam"]:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer: Any = DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        else:
            optimizer = torch.optim.AdamW(groups, fused=True, **options)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        if job.get("compiled"):
            for layer in base_of(model).base_model.layers:
                layer.compile()
        clock.engine = engine_of(engine)
        place = SimpleNamespace(device=engine.device, data_parallel_size=1)
        windows = assemble.arranged_windows(prepared, place, TrainState(), print)  # type: ignore[arg-type]
        steps = [[batch.to(engine.device) for batch in next(windows)] for _ in range(job["warm"] + job["timed"])]
        engine.train()
        for window in steps:
            for batch in window:
                nll = engine(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets)
                loss = nll / batch.num_targets
                engine.backward(loss)
                engine.step()
                clock.computed(batch.inputs["input_ids"], loss / len(window))
            clock.step_ended()


def child_hf(job: dict[str, Any], clock: Clock) -> None:
    """HF Trainer with DeepSpeed: one document a row, each batch padded to its longest."""
    import numpy as np
    import torch

    meter_transformers(clock)
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(FOLDER / "runs" / "hf"),
        per_device_train_batch_size=job["hf_rows"],
        gradient_accumulation_steps=job["accumulation"],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta2=0.95,
        max_steps=100_000,
        logging_steps=job["log_every"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=bool(job["dry"]),
        bf16=True,
        gradient_checkpointing=job["checkpointing"],
        deepspeed=job["deepspeed"],
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    if job["lora"]:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="CAUSAL_LM", r=job["lora"], lora_alpha=2 * job["lora"], target_modules="all-linear")
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        if job["checkpointing"]:
            model.enable_input_require_grads()
    lengths = np.load(job["lengths"])
    tokens = np.fromfile(Path(job["data"]).with_suffix(".bin"), np.int32)
    ends = lengths.cumsum()
    documents = [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
    rows = [{"input_ids": each, "labels": each, "attention_mask": [1] * len(each)} for each in documents]
    collator = DataCollatorForSeq2Seq(tokenizer)
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer).train()


def child_model(job: dict[str, Any], clock: Clock) -> None:
    """A model folder with random weights, made on the device since 8B on a CPU take minutes; and a tokenizer of its size."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    fields = dict(job["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    device = "cpu" if job["dry"] else "cuda"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    model.tie_weights()
    model.save_pretrained(job["model"])
    words = Tokenizer(models.WordLevel({str(token): token for token in range(job["config"]["vocab_size"])}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0").save_pretrained(job["model"])
    Path(job["answer"]).write_text("{}")


CHILDREN = {"ours": child_ours, "bare": child_bare, "hf": child_hf, "model": child_model}
NAMES = {"ours": "ds_trainer", "bare": "hand-written loop", "hf": "HF Trainer"}


# -- the parent ---------------------------------------------------------------------------------------------------------


class Bench:
    """What the steps share: sizes of this run, jobs in processes of their own, rows of the result."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.dry: bool = arguments.dry
        self.name: str = arguments.step
        self.device, self.memory = ("cpu, dry", 0) if self.dry else the_gpu()
        known = next((peak for name, peak in PEAKS.items() if name in self.device), None)
        self.peak = arguments.peak_tflops * 1e12 if arguments.peak_tflops else known
        self.rows: list[list[Any]] = []
        self.tables: list[dict[str, Any]] = []
        self.goals: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._begun = time.monotonic()
        self._seconds: float = arguments.seconds
        self._port = 29700 + os.getpid() % 200

    def small(self, value: int, tiny: int) -> int:
        """A size: the real one, or that of a dry run."""
        return tiny if self.dry else value

    def train(self, who: str, model: str, *, seq_len: int, rows: int, **options: Any) -> dict[str, Any]:
        """Run one contender and add its row to the table; {} when it did not come through, with a note.

        Args:
            who: `ours`, `bare` or `hf`.
            model: of MODELS.
            seq_len: positions in a row.
            rows: of a micro-batch.
            **options: law, accumulation, checkpointing, lora, zero, log_every, profiled, compiled, label, hf_rows, steps,
                offload, low_memory, chunked, deterministic.
        """
        label = options.get("label", "")
        said = f"{NAMES[who]}, {model}, {rows} x {seq_len}{', ' + label if label else ''}"
        left = self._seconds - (time.monotonic() - self._begun)
        if left < 40 and not self.dry:
            self.notes.append(f"Left out for want of time: {said}.")
            return {}
        if self.dry:
            model, seq_len = "tiny", max(32, seq_len // 64)
        job = self._job(who, model, seq_len, rows, options)
        print(f"{said} ...", flush=True)
        found = self._run(job, 600 if self.dry else left)
        if problem := found.get("problem"):
            self.notes.append(f"{said}: {problem}.")
            print(f"  {problem}", flush=True)
            return {}
        config = MODELS[model]
        if found.get("kernels"):
            columns = ["kernel", "ms a step", "calls a step"]
            self.tables.append({"title": f"Kernels that take longest: {said}", "columns": columns, "rows": found["kernels"]})
        speed = 1000 * found["tokens"] / found["ms_all"]
        flops = flops_per_token(config, seq_len, frozen=bool(options.get("lora")))
        full = options.get("law") is None
        found |= {"tokens_per_s": speed, "mfu": 100 * speed * flops / self.peak if self.peak and full else None}
        planned = self._planned(job) if who == "ours" and not self.dry else None
        if planned:
            self.goals.append(
                goal(f"{said}: plan's memory of the GPU by what was taken, off by", 10.0, off(planned, found), "%")
            )
        self.rows.append(
            [
                NAMES[who],
                model,
                f"{rows} x {seq_len}" + (f" x {job['accumulation']}" if job["accumulation"] > 1 else ""),
                label,
                speed,
                found["ms"],
                found["mfu"],
                found["tokens"] / found["positions"],
                found["peak_bytes"] / GIB,
                planned / GIB if planned else None,
                found["loss"],
            ]
        )
        return found

    def compare(self, name: str, ours: Mapping[str, Any], other: Mapping[str, Any], least: float) -> None:
        """A goal from two runs that both came through; of equal weights and random tokens, any batch has about one loss."""
        if ours and other:
            if not abs(ours["loss"] - other["loss"]) <= 0.02 * other["loss"]:
                sys.exit(f"{name}: first losses {ours['loss']} and {other['loss']}; what is timed is not the same")
            found = ours["tokens_per_s"] / other["tokens_per_s"]
            self.goals.append(goal(f"{name}: useful tokens/s, by it", least, found, "times", at_least=True))

    def require_equal(self, ours: Mapping[str, Any], bare: Mapping[str, Any]) -> None:
        """The loop by hand has our batches and our model, so it has our loss; bf16 sums in another order."""
        if ours and bare and not abs(ours["loss"] - bare["loss"]) <= 2e-3 * bare["loss"]:
            sys.exit(f"the first losses differ: ours {ours['loss']}, by hand {bare['loss']}; what is timed is not the same")

    def finish(self, tables: Sequence[Mapping[str, Any]] = ()) -> None:
        columns = ["who", "model", "rows x positions", "what", "tokens/s", "ms a step", "MFU, %", "useful share"]
        own = {
            "title": "Training: useful tokens a second, median step, model FLOPs by peak, memory of the GPU at most",
            "columns": [*columns, "peak, GiB", "planned, GiB", "first loss"],
            "rows": self.rows,
        }
        peak = f"peak {self.peak / 1e12:.0f} TFLOP/s" if self.peak else "peak unknown: give --peak-tflops for MFU"
        if self.dry:
            print("\nDRY: tiny shapes on a CPU. These figures mean nothing; they show that the step runs.")
        finish(
            f"gpu_{self.name}",
            quick=self.dry,
            goals=self.goals,
            tables=[*tables, *([own] if self.rows else []), *self.tables],
            packages={"device": self.device} | versions("torch", "deepspeed", "transformers", "peft"),
            notes=[*self.notes, f"{peak}; MFU counts causal attention, and 4 instead of 6 for each parameter with LoRA."],
            seed=0,
        )

    def _job(self, who: str, model: str, seq_len: int, rows: int, options: Mapping[str, Any]) -> dict[str, Any]:
        steps = options.get("steps") or (self.small(10, 1), self.small(30, 2))
        accumulation = options.get("accumulation", 1)
        run = FOLDER / "runs" / who
        shutil.rmtree(run, ignore_errors=True)
        (FOLDER / "runs").mkdir(parents=True, exist_ok=True)
        job = {
            "who": who,
            "dry": self.dry,
            "model": str(self._model(model)),
            "warm": steps[0],
            "timed": steps[1],
            "accumulation": accumulation,
            "checkpointing": bool(options.get("checkpointing")),
            "lora": options.get("lora", 0),
            "log_every": options.get("log_every", 10),
            "profiled": options.get("profiled", 0),
            "compiled": bool(options.get("compiled")),
            "hf_rows": options.get("hf_rows", rows),
            "cpu_adam": bool(options.get("offload")) and self._has_op("cpu_adam"),
        }
        count = (steps[0] + steps[1] + 8) * rows * accumulation  # 8 are more than are profiled: all contenders have equal data
        job["data"], job["lengths"] = self._data(options.get("law"), seq_len, count, MODELS[model]["vocab_size"])
        block: dict[str, Any] = json.loads((ROOT / "ds_configs" / f"zero{options.get('zero', 2)}.json").read_text())
        if options.get("offload"):
            block["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": not self.dry}
        if options.get("low_memory"):
            block["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        # torch's fused AdamW for everybody: no compiler is needed, and the optimizers are equal. With offload, DeepSpeed's for
        # the CPU where it can be built, and torch's otherwise.
        adam = {"type": "AdamW", "params": {"torch_adam": not job["cpu_adam"]}}
        if job["cpu_adam"] and options.get("low_memory"):
            # Ours builds a CPUAdam with fp32 states; with this parameter DeepSpeed builds its own, with states in bf16.
            adam = {"type": "AdamW", "params": {"fp32_optimizer_states": False}}
        ours = block | {"optimizer": adam}
        if not job["cpu_adam"]:
            block |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        for name, content in (("hf", block), ("ours", ours)):
            (FOLDER / f"{name}.json").write_text(json.dumps(content))
        job["deepspeed"] = str(FOLDER / "hf.json")
        settings: dict[str, Any] = {
            "model": {
                "path": job["model"],
                "gradient_checkpointing": job["checkpointing"],
                "chunked_loss": options.get("chunked", True),
            },
            "data": {
                "sources": [{"path": job["data"], "format": "tokens"}],
                "seq_len": seq_len,
                "cache_folder": str(run / "data_cache"),
            },
            "train": {
                "stage": "pretrain",
                "max_steps": 100_000,
                "micro_batch_size": rows,
                "gradient_accumulation_steps": accumulation,
                "schedule": "constant",
                "deterministic": bool(options.get("deterministic")),
            },
            "deepspeed": {"config": str(FOLDER / "ours.json")},
            "checkpoint": {"folder": str(run), "resume": "never"},
            "monitor": {"log_every_steps": job["log_every"]},
        }
        if job["lora"]:
            lora = {"rank": job["lora"], "alpha": 2.0 * job["lora"], "target_modules": "all-linear"}
            settings["adapter"] = {"lora": lora}
        job["run_file"] = str(FOLDER / f"{who}.yaml")
        Path(job["run_file"]).write_text(json.dumps(settings, indent=1))  # JSON is YAML
        return job

    def _run(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Run a job in a process of its own; what it found, or why not as `problem`."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        answer, path, log = FOLDER / "answer.json", FOLDER / "job.json", FOLDER / f"{job['who']}.log"
        answer.unlink(missing_ok=True)
        path.write_text(json.dumps(job | {"answer": str(answer)}))
        self._port += 1
        environ = child_environment() | launched(self._port)
        if self.dry:
            environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(path)], stdout=output, stderr=subprocess.STDOUT, env=environ
            )
            try:
                code = process.wait(max(30.0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return {"problem": "did not end in the time that was left"}
        if answer.exists():
            result: dict[str, Any] = json.loads(answer.read_text())
            return result
        text = log.read_text(errors="replace") + "".join(
            each.read_text(errors="replace") for each in (FOLDER / "runs").glob(f"{job['who']}/logs/*")
        )
        if "out of memory" in text.lower():
            return {"problem": "out of memory", "out_of_memory": True}
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raised = [line for line in lines if "Error" in line or line.startswith("ds_trainer:")] or lines[-1:] or ["nothing"]
        return {"problem": f"ended with code {code}: {raised[-1][:240]} (see {log.relative_to(ROOT)})"}

    def _model(self, name: str) -> Path:
        folder = FOLDER / f"model_{name}"
        if not (folder / "tokenizer.json").exists():
            print(f"making the weights of {name}", flush=True)
            found = self._run({"who": "model", "dry": self.dry, "config": MODELS[name], "model": str(folder)}, 300)
            if "problem" in found:
                sys.exit(f"no model could be made: {found['problem']}")
        return folder

    def _data(self, law: str | None, seq_len: int, rows: int, vocabulary: int) -> tuple[str, str]:
        """Random documents: full rows without a law, else enough of the law to fill so many rows; as Megatron's files."""
        import numpy as np

        from ds_trainer.data.store import write_index

        if law is None:
            lengths = np.full(rows, seq_len)
        else:
            lengths = np.minimum(lengths_of(law, 64 * rows + 1024), seq_len)
            if self.dry:
                lengths = np.maximum(lengths * seq_len // CAPACITY, 4)
            lengths = lengths[: int(np.searchsorted(lengths.cumsum(), 1.3 * rows * seq_len)) + 1]
        path = FOLDER / "data.idx"
        tokens = np.random.default_rng(0).integers(2, vocabulary, int(lengths.sum()), dtype=np.int32)  # 0 is padding, 1 an end
        tokens.tofile(path.with_suffix(".bin"))
        write_index(path, lengths.astype(np.int32), "int32")
        np.save(FOLDER / "lengths.npy", lengths)
        return str(path), str(FOLDER / "lengths.npy")

    def _has_op(self, name: str) -> bool:
        """Whether one of DeepSpeed's ops can be used; in a dry run, which compiles nothing, only if it is built."""
        from ds_trainer.engine.offload import examine_op, why_not

        reason = "it is not built here" if self.dry and not examine_op(name)["built"] else why_not(name)
        note = f"torch's AdamW instead of DeepSpeed's {name}: {reason}"
        if reason and note not in self.notes:
            self.notes.append(note)
        return reason is None

    def _planned(self, job: Mapping[str, Any]) -> float | None:
        """What `ds_trainer plan` says that a GPU will hold at most, in bytes."""
        command = [sys.executable, "-m", "ds_trainer", "plan", "--config", job["run_file"], "--gpus", "1", "--json"]
        memory = ["--gpu-memory", f"{self.memory // GIB}GiB"]
        with suppress(subprocess.SubprocessError, ValueError, LookupError):
            said = subprocess.run([*command, *memory], capture_output=True, text=True, timeout=45, check=False).stdout
            needs = json.loads(said)["needs"]
            return float(next(each["bytes"] for each in needs if "GPU" in each["what"]))
        self.notes.append("`ds_trainer plan` gave no figure for one of the runs.")
        return None


def the_gpu() -> tuple[str, int]:
    """Its name and bytes, asked in a process of its own: this one must hold none of its memory while others measure theirs."""
    ask = "import torch; found = torch.cuda.get_device_properties(0); print(found.name); print(found.total_memory)"
    name, memory = subprocess.check_output([sys.executable, "-c", ask], text=True).splitlines()[-2:]
    return name, int(memory)


def off(planned: float, found: Mapping[str, Any]) -> float:
    """Percent by which a plan misses what was taken."""
    return 100 * abs(planned - found["peak_bytes"]) / found["peak_bytes"]


# -- the steps ----------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """G0: what the machine can do at best: matrix products, copies, the bus, AdamW on GPU and CPU."""
    import torch

    device = "cpu" if bench.dry else "cuda"
    rows: list[list[Any]] = []
    size = bench.small(8192, 256)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(bench, lambda: a @ b)
    rows.append([f"matrix product, bf16, {size}^3", 2 * size**3 / product / 1e9, "TFLOP/s"])
    if bench.peak:
        rows.append(["the same, of the peak", 2 * size**3 / product / 1e-3 / bench.peak * 100, "%"])
    big = torch.empty(bench.small(GIB, 1 << 20), dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    rows.append(
        ["copy on the device, read and written", 2 * big.numel() / milliseconds(bench, lambda: other.copy_(big)) / 1e6, "GB/s"]
    )
    host = torch.empty(big.numel(), dtype=torch.uint8, pin_memory=not bench.dry)
    for name, copy in (
        ("host to device, pinned", lambda: big.copy_(host, non_blocking=True)),
        ("device to host, pinned", lambda: host.copy_(big, non_blocking=True)),
    ):
        rows.append([name, big.numel() / milliseconds(bench, copy) / 1e6, "GB/s"])
    count = bench.small(200_000_000, 100_000)
    for place in dict.fromkeys((device, "cpu")):
        parameter = torch.nn.Parameter(torch.zeros(count if place == device else count // 4, device=place))
        parameter.grad = torch.ones_like(parameter)
        adam = torch.optim.AdamW([parameter], fused=True)
        took = milliseconds(bench, adam.step)
        rows.append([f"torch's fused AdamW, fp32, {place}", parameter.numel() / took / 1e6, "G parameters/s"])
    if not bench.dry and bench._has_op("fused_adam"):
        from deepspeed.ops.adam import FusedAdam

        parameter = torch.nn.Parameter(torch.zeros(count, device=device))
        parameter.grad = torch.ones_like(parameter)
        took = milliseconds(bench, FusedAdam([parameter], adam_w_mode=True).step)
        rows.append(["DeepSpeed's FusedAdam, fp32", parameter.numel() / took / 1e6, "G parameters/s"])
    if bench._has_op("cpu_adam"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        parameter = torch.nn.Parameter(torch.zeros(count // 4))
        parameter.grad = torch.ones_like(parameter)
        took = milliseconds(bench, DeepSpeedCPUAdam([parameter], adamw_mode=True).step)
        rows.append(["DeepSpeed's CPUAdam, fp32", parameter.numel() / took / 1e6, "G parameters/s"])
    bench.finish([{"title": "What the machine can do", "columns": ["what", "found", "unit"], "rows": rows}])


def milliseconds(bench: Bench, run: Callable[[], Any]) -> float:
    """Median of 20 calls after 5."""
    import torch

    took = []
    for index in range(bench.small(25, 4)):
        if bench.dry:
            begun = time.perf_counter()
            run()
            ms = 1000 * (time.perf_counter() - begun)
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            ms = begin.elapsed_time(end)
        if index >= bench.small(5, 1):
            took.append(ms)
    return statistics.median(took)


def full_ft(bench: Bench) -> None:
    """G1: full fine-tuning in bf16 with ZeRO-2, rows full."""
    for model, rows, least_mfu, checkpointing in (("1B", 4, 40, False), ("3B", 2, 40, True), ("0.5B", 4, 33, False)):
        options: dict[str, Any] = {"seq_len": 4096, "rows": rows, "checkpointing": checkpointing}
        options["label"] = "activations recomputed" if checkpointing else ""
        ours, bare = (bench.train(who, model, **options, profiled=2 * (who == "ours")) for who in ("ours", "bare"))
        bench.require_equal(ours, bare)
        bench.compare(f"{model}, hand-written loop", ours, bare, 0.98)
        bench.compare(f"{model}, HF Trainer", ours, bench.train("hf", model, **options), 1.15)
        if ours and ours["mfu"] is not None:
            bench.goals.append(goal(f"{model}: MFU", least_mfu, ours["mfu"], "%", at_least=True))
    for seq_len, rows in ((2048, 8), (8192, 2)):
        bench.train("ours", "1B", seq_len=seq_len, rows=rows)
    bench.train("ours", "1B", seq_len=4096, rows=4, deterministic=True, label="deterministic")
    bench.finish()


def lora_8b(bench: Bench) -> None:
    """G2: LoRA of rank 16 on all linear layers of 8B, two rows of 4096."""
    options: dict[str, Any] = {"seq_len": 4096, "rows": 2, "lora": 16, "checkpointing": True, "label": "LoRA, recomputed"}
    ours, bare, hf = (bench.train(who, "8B", **options, profiled=2 * (who == "ours")) for who in ("ours", "bare", "hf"))
    bench.require_equal(ours, bare)
    bench.compare("8B LoRA, hand-written loop", ours, bare, 0.98)
    bench.compare("8B LoRA, HF Trainer with peft", ours, hf, 1.15)
    plain = bench.train("ours", "8B", **options | {"checkpointing": False, "rows": 1, "label": "LoRA, nothing recomputed"})
    best = max((each["tokens_per_s"] for each in (ours, plain) if each), default=None)
    if best is not None:
        bench.goals.append(goal("8B LoRA, ours", 11_000, best, "tokens/s", at_least=True))
    bench.finish()


def full_8b(bench: Bench) -> None:
    """G3: all of 8B with optimizer states in bf16: on the GPU, which takes 80 GiB and more, and on the host."""
    options: dict[str, Any] = {"seq_len": 4096, "rows": 2, "checkpointing": True, "low_memory": True, "accumulation": 8}
    steps = (2, 6) if not bench.dry else (1, 2)
    if bench.dry or bench.memory >= 100 * GIB:
        found = bench.train("ours", "8B", **options | {"label": "states in bf16", "steps": steps})
        if found:
            bench.goals.append(goal("8B full, states on the GPU", 6500, found["tokens_per_s"], "tokens/s", at_least=True))
    else:
        bench.notes.append(f"States on the GPU need about 85 GiB with activations; this one has {bench.memory / GIB:.0f}.")
    found = bench.train("ours", "8B", **options | {"offload": True, "label": "states in bf16, on the host", "steps": (1, 3)})
    if found:
        bench.goals.append(goal("8B full, states on the host", 4000, found["tokens_per_s"], "tokens/s", at_least=True))
    bench.finish()


def pack_vs_pad(bench: Bench) -> None:
    """G4: ragged documents: packed rows against batches of 8 that are padded to their longest."""
    for law, least in (("Alpaca-like", 2.0), ("chat-like", 1.5)):
        ours = bench.train("ours", "1B", seq_len=CAPACITY, rows=4, law=law, label=f"{law}, packed")
        bare = bench.train("bare", "1B", seq_len=CAPACITY, rows=4, law=law, label=f"{law}, packed")
        hf = bench.train("hf", "1B", seq_len=CAPACITY, rows=4, hf_rows=8, law=law, label=f"{law}, 8 documents padded")
        bench.require_equal(ours, bare)
        bench.compare(f"{law}, hand-written loop", ours, bare, 0.98)
        bench.compare(f"{law}, HF Trainer with padding", ours, hf, least)
    bench.finish()


def loss_head(bench: Bench) -> None:
    """G5: head and loss of one forward and backward: time and memory, ours in chunks against whole logits and Liger's."""
    import torch

    from ds_trainer.objectives.chunked_head import chunked_nll_sum, plain_nll_sum

    ways: dict[str, Callable[..., Any]] = {
        "ours, in chunks": lambda hidden, weight, targets: chunked_nll_sum(hidden, weight, None, targets) / len(targets),
        "logits whole": lambda hidden, weight, targets: plain_nll_sum(hidden @ weight.T, targets) / len(targets),
    }
    with suppress(ImportError):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        ways["Liger"] = lambda hidden, weight, targets: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)[0]
    if "Liger" not in ways:
        bench.notes.append("Liger's kernels are not installed, so they are not compared.")
    rows: list[list[Any]] = []
    for vocabulary in (bench.small(128_256, 512), bench.small(151_936, 768)):
        for tokens in (8192, 16_384, 32_768):
            found: dict[str, tuple[float, float, float]] = {}
            for name, way in ways.items():
                try:
                    found[name] = head_cost(bench, way, bench.small(tokens, tokens // 128), vocabulary)
                except torch.OutOfMemoryError:
                    bench.notes.append(f"{name}, {tokens} targets, {vocabulary} words: out of memory.")
            rows += [[name, vocabulary, tokens, *each] for name, each in found.items()]
            if {"ours, in chunks", "logits whole"} <= found.keys():
                (ms, peak, loss_ours), (plain_ms, plain_peak, loss_plain) = found["ours, in chunks"], found["logits whole"]
                if not abs(loss_ours - loss_plain) <= 1e-2 * loss_plain:
                    sys.exit(f"the losses differ: {loss_ours} in chunks, {loss_plain} whole; what is timed is not the same")
                what = f"head, {vocabulary:,} words, {tokens:,} targets"
                bench.goals.append(goal(f"{what}: time, whole = 1", 1.05, ms / plain_ms))
                if not bench.dry:
                    bench.goals.append(goal(f"{what}: memory, whole = 1", 0.25, peak / plain_peak))
    columns = ["how", "vocabulary", "targets", "ms", "peak, GiB", "loss"]
    bench.finish([{"title": "Head and loss, forward and backward, bf16", "columns": columns, "rows": rows}])


def attention_ways(bench: Bench) -> None:
    """G11: attention of packed rows, forward and backward: one call for all documents against one for each."""
    count = bench.small(16_384, 256)
    rows: list[list[Any]] = []
    laws = {f"{count // parts:,} each": [count // parts] * parts for parts in (4, 8, 16, 32)}
    for name, drawn in (laws | {law: lengths_of(law, count).tolist() for law in ("chat-like", "Alpaca-like")}).items():
        starts = [0, *(end for end in itertools.accumulate(drawn) if end < count), count]
        one, each = attention_cost(bench, starts)
        rows.append([name, len(starts) - 1, one, each, each / one])
    columns = ["documents", "how many", "one call, ms", "a call each, ms", "times"]
    title = f"Attention over {count:,} positions of 32 heads of 64, 8 of keys, forward and backward"
    bench.finish([{"title": title, "columns": columns, "rows": rows}])


def attention_cost(bench: Bench, starts: list[int]) -> tuple[float, float]:
    """Milliseconds of attention in documents with these starts, and the end of the last: in one call, and in one for each."""
    import torch

    from ds_trainer.model import attention

    device, dtype = ("cpu", torch.float32) if bench.dry else ("cuda", torch.bfloat16)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, starts[-1], 64, dtype=dtype, device=device, requires_grad=True) for heads in (32, 8, 8)]
    module = torch.nn.Linear(1, 1)
    attention.LONG_DOCUMENT = 1 << 40  # what is measured here decides it
    lengths = tuple(end - start for start, end in itertools.pairwise(starts))

    def run(bounds: torch.Tensor | None) -> torch.Tensor:
        for each in inputs:
            each.grad = None
        found, _ = attention._document_attention(module, *inputs, None, document_lengths=lengths, document_bounds=bounds)
        found.float().square().sum().backward()
        return found.detach()

    bounds = torch.tensor(starts, dtype=torch.int32, device=device)
    one, each = run(bounds), run(None)
    if not (one - each).norm() <= 1e-2 * each.norm():
        sys.exit("the two ways compute something else; what is timed is not the same")
    return milliseconds(bench, lambda: run(bounds)), milliseconds(bench, lambda: run(None))


def head_cost(bench: Bench, way: Callable[..., Any], count: int, vocabulary: int) -> tuple[float, float, float]:
    """Milliseconds, GiB at most above the inputs (NaN on a CPU) and the loss of one way to compute head and loss."""
    import torch

    device, width = ("cpu", 64) if bench.dry else ("cuda", 2048)
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16)).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), device=device)
    losses = []

    def run() -> None:
        hidden.grad = weight.grad = None
        loss = way(hidden, weight, targets)
        loss.backward()
        losses[:] = [loss.detach()]

    if bench.dry:
        return milliseconds(bench, run), float("nan"), float(losses[0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(bench, run)
    return ms, (torch.cuda.max_memory_allocated() - before) / GIB, float(losses[0])


def host_sync(bench: Bench) -> None:
    """G6: what logging at every step costs, and how often the host waits for the device."""
    options: dict[str, Any] = {"seq_len": 1024, "rows": 1, "profiled": 4}
    found = {
        (who, every): bench.train(who, "0.5B", **options, log_every=every, label=f"log every {every}")
        for who, every in (("ours", 1000), ("ours", 10), ("ours", 1), ("hf", 1000), ("hf", 1))
    }
    rows = [
        [NAMES[who], every, *(each["waits"][name] for name in each["waits"])] for (who, every), each in found.items() if each
    ]
    if found["ours", 1] and found["ours", 10]:
        more = 100 * (found["ours", 1]["ms"] / found["ours", 10]["ms"] - 1)
        bench.goals.append(goal("a line of metrics at every step instead of every tenth costs", 1.0, more, "%"))
    if waited := found["ours", 1000]:
        waits = waited["waits"]["cudaStreamSynchronize"] + waited["waits"]["cudaDeviceSynchronize"]
        bench.goals.append(goal("waits for the device in a step without a line of metrics", 0, waits))
    columns = ["who", "steps a line", *WAITS[:3], "item(), of host tensors too"]
    bench.finish([{"title": "Waits of the host for the device, a step", "columns": columns, "rows": rows}])


def zero3_host(bench: Bench) -> None:
    """G7: from how many tokens a step ZeRO-3 costs no more than ZeRO-2 on one GPU, where it only costs."""
    for model, lengths in (("0.5B", (2048, 8192, 16_384, 32_768)), ("3B", (4096, 16_384))):
        for tokens in lengths[: bench.small(4, 1)]:
            options: dict[str, Any] = {"seq_len": 2048, "rows": tokens // 2048, "checkpointing": model == "3B"}
            if bench.dry:
                options["rows"] = 1
            two, three = (
                bench.train("ours", model, **options, zero=stage, label=f"ZeRO-{stage}, {tokens} tokens a step")
                for stage in (2, 3)
            )
            if two and three and tokens >= 16_384:
                name = f"{model}, {tokens} tokens a step: time with ZeRO-3, ZeRO-2 = 1"
                bench.goals.append(goal(name, 1.1, three["ms"] / two["ms"]))
        options = {"seq_len": 2048, "rows": 1, "zero": 3, "label": "ZeRO-3, 2048 tokens a step", "checkpointing": model == "3B"}
        bench.train("bare", model, **options)
    bench.finish()


def offload_3b(bench: Bench) -> None:
    """G8: what the optimizer on the host costs, by the tokens of a step."""
    for accumulation in (1, 4, 16)[: bench.small(3, 2)]:
        options: dict[str, Any] = {"seq_len": 4096, "rows": 1, "checkpointing": True, "accumulation": accumulation}
        options["steps"] = (1, 2) if bench.dry else (2, 6)
        kept, moved = (
            bench.train("ours", "3B", **options, offload=offload, label="optimizer on the host" if offload else "")
            for offload in (False, True)
        )
        if kept and moved and accumulation == 16:
            name = f"3B, {4096 * accumulation} tokens a step: time with the optimizer on the host, on the GPU = 1"
            bench.goals.append(goal(name, 1.3, moved["ms"] / kept["ms"]))
    bench.finish()


def max_seq(bench: Bench) -> None:
    """G9: the longest row of 8B LoRA that fits, by doubling, with recomputed activations."""
    longest: dict[str, dict[str, Any]] = {}
    for who in ("hf", "ours"):
        for power in range(13, bench.small(19, 15)):
            options: dict[str, Any] = {"seq_len": 1 << power, "rows": 1, "lora": 16, "checkpointing": True, "steps": (1, 2)}
            found = bench.train(who, "8B", **options, label="LoRA, recomputed")
            if not found:
                break
            longest[who] = found | {"seq_len": 1 << power}
    if longest.keys() >= {"hf", "ours"}:
        times = longest["ours"]["seq_len"] / longest["hf"]["seq_len"]
        bench.goals.append(goal("8B LoRA: longest row, by that of HF Trainer", 4, times, "times", at_least=True))
        bench.goals.append(goal("8B LoRA: longest row", 131_072, longest["ours"]["seq_len"], "positions", at_least=True))
    bench.finish()


def compile_(bench: Bench) -> None:
    """G10: the layers compiled by torch, in the hand-written loop: what a setting for it would bring."""
    for stage in (1, 2):
        options: dict[str, Any] = {"seq_len": 4096, "rows": 4, "zero": stage}
        plain = bench.train("bare", "1B", **options, label=f"ZeRO-{stage}")
        compiled = bench.train("bare", "1B", **options, compiled=True, label=f"ZeRO-{stage}, layers compiled")
        bench.train("ours", "1B", **options, label=f"ZeRO-{stage}")
        bench.compare(f"1B, ZeRO-{stage}: layers compiled, plain", compiled, plain, 1.1)
    bench.finish()


STEPS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "full_ft": full_ft,
    "lora_8b": lora_8b,
    "full_8b": full_8b,
    "pack_vs_pad": pack_vs_pad,
    "loss_head": loss_head,
    "attention": attention_ways,
    "host_sync": host_sync,
    "zero3_host": zero3_host,
    "offload_3b": offload_3b,
    "max_seq": max_seq,
    "compile": compile_,
}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(Path(sys.argv[2]).read_text())
        CHILDREN[job["who"]](job, Clock(job))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "step", choices=STEPS, help="what is measured: " + "; ".join(f"{name}: {run.__doc__}" for name, run in STEPS.items())
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU; nothing is kept")
    parser.add_argument(
        "--seconds", type=float, default=STEP_SECONDS, help="what the step may take; jobs after that are left out"
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="of dense bf16 by the data sheet, for MFU on other GPUs than H100 and H200"
    )
    arguments = parser.parse_args()
    import torch

    if not arguments.dry and not torch.cuda.is_available():
        sys.exit(f"gpu.py {arguments.step}: torch {torch.__version__} sees no GPU here. Add --dry to try the step on the CPU.")
    STEPS[arguments.step](Bench(arguments))


if __name__ == "__main__":
    main()
