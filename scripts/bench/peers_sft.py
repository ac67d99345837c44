"""Useful tokens per second of fine-tuning on ragged chats: this project beside HF Trainer, TRL, LLaMA-Factory and axolotl.

Each peer is installed into an environment of its own (out/bench/peers_NAME) and trains the same 5.3M-parameter Llama from the
same weights on the same conversations: lengths by the Alpaca-like law, at most 512 tokens, fp32, AdamW, ZeRO-2 where the peer
can, about eight conversations in an update. A useful token is one of a conversation; padding is none.

Before any timing counts, the first step of every contender is computed again, conversation by conversation, by plain
transformers: its tokens must be those of the data, its loss the same within 1e-3, its engine the one it is said to be.
Then those of a peer and ours take turns of five steps (A B A B ...), as many as make a pass over the data; the figure is the
tokens of that pass by its CPU seconds, since batches of ragged conversations are not alike. Making the environments takes
minutes the first time, the run about seven.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from common import LAWS, MIB, ROOT, SCRATCH, child_environment, finish, goal, parse_arguments, versions
from peers_child import launched

FOLDER = SCRATCH / "peers_sft"
CHILD = Path(__file__).with_name("peers_child.py")
SEQ_LEN, VOCABULARY, BATCH, ROWS = 512, 8192, 8, 2
"""Eight conversations are about 1,050 tokens, and so are two packed rows: every contender updates about equally often."""
TURNS, STEPS = 4, 5
"""Turns of each contender, and steps in a turn: together a pass over the data."""
LEARNING_RATE = 1e-4
WARM_UP = 3
"""Steps of each contender before its first turn; the first of them is the one that is checked."""
TOLERANCE = 1e-3
CPU_ALONE = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
START_SECONDS, TURN_SECONDS = 300, 300
"""Who takes longer is left out, on a busy machine too."""
PAD, BEGIN, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n' if not loop.first }}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML without the line break after the last turn: what is trained is then the same for everybody, to the token."""

TORCH = "torch==2.13.0"
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "trl": ("--no-deps", "trl==1.16.0"),
    "llamafactory": ("llamafactory==0.9.5", TORCH),
    "axolotl": ("axolotl==0.19.0", TORCH),
}
"""What is installed beside the packages of this project's environment, which they see where they bring none of their own."""


@dataclass(kw_only=True)
class Contender:
    """A trainer with its settings: a process that waits for its turns."""

    who: str
    how: str
    trainer: str
    python: Path
    settings: Any
    rows: int = BATCH
    expects: str = "DeepSpeedEngine ZeRO-2"
    problem: str = ""
    """Why it is not measured."""
    first: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    _process: Any = None

    @property
    def name(self) -> str:
        return "_".join(f"{self.trainer} {self.how}".replace(",", "").split())

    def start(self, pad_id: int, port: int) -> None:
        """Start the process; `warmed_up` waits for it."""
        print(f"starting {self.who}, {self.how}", flush=True)
        run, log = FOLDER / "runs" / self.name, FOLDER / f"{self.name}.log"
        shutil.rmtree(run, ignore_errors=True)
        (FOLDER / "runs").mkdir(exist_ok=True)
        job = {
            "trainer": self.trainer,
            "settings": self.settings,
            "common": common_settings(self, run),
            "model": str(FOLDER / "model"),
            "data": str(FOLDER / "data.jsonl"),
            "cache": str(FOLDER / "cache"),
            "seq_len": SEQ_LEN,
            "pad_id": pad_id,
            "warm_up": WARM_UP,
            "run_file": str(write_run_file(self, run)) if self.trainer == "ours" else "",
            "spawned": time.time(),
        }
        path = FOLDER / f"{self.name}.json"
        path.write_text(json.dumps(job))
        child_read, self._write = os.pipe()
        self._read, child_write = os.pipe()
        self._buffer = b""
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [str(self.python), str(CHILD), str(path), str(child_read), str(child_write)],
                pass_fds=(child_read, child_write),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=FOLDER,
                env=child_environment() | launched(port) | CPU_ALONE,
            )
        os.close(child_read)
        os.close(child_write)

    def warmed_up(self) -> None:
        """Wait for the first step and for the warm-up; what goes wrong becomes `problem`."""
        self.first = self._answer(START_SECONDS)
        if not self.problem:
            self._answer(START_SECONDS)

    def turn(self) -> None:
        if self.problem:
            return
        os.write(self._write, f"{STEPS}\n".encode())
        found = self._answer(TURN_SECONDS)
        if found:
            self.turns.append(found)

    def end(self) -> None:
        """Let the process end, if it was started: it does when its input is closed."""
        if self._process is None:
            return
        os.close(self._write)
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, seconds: float) -> dict[str, Any]:
        """The next thing the process says; {} and a `problem` when it ends or says nothing in time."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                self.problem = f"said nothing for {seconds:.0f} s"
                return {}
            part = os.read(self._read, 1 << 16)
            if not part:
                lines = (FOLDER / f"{self.name}.log").read_text(errors="replace").strip().splitlines()
                raised = [line for line in lines if "Error" in line] or lines[-1:] or ["nothing"]
                self.problem = f"ended with code {self._process.wait()}: {raised[-1].strip()[:200]}"
                return {}
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def rate(self, what: str, per: str, since: int = 0) -> float:
        """One quantity by another, over the turns from one on; NaN without turns."""
        turns = self.turns[since:]
        return sum(each[what] for each in turns) / sum(each[per] for each in turns) if turns else float("nan")


# -- the same for everybody ---------------------------------------------------------------------------------------------


def make_material(conversations: int) -> tuple[Any, Any]:
    """Tokenizer, model and conversations in FOLDER, made from the documentation that ships with Python.

    Returns:
        The tokenizer and the model.
    """
    from pydoc_data.topics import topics

    import numpy as np
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "\n".join(topics[name] for name in sorted(topics))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, BEGIN, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(FOLDER / "model")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        initializer_range=256**-0.5,  # so that what a conversation sees changes its loss: a leak must show
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(FOLDER / "model")

    median, sigma = LAWS["Alpaca-like"]
    random = np.random.default_rng(0)
    words = text.split()
    around = 9  # tokens of the template
    with (FOLDER / "data.jsonl").open("w") as file:
        for length in np.clip(random.lognormal(np.log(median), sigma, conversations), 24, SEQ_LEN - 12).astype(int):
            # Prose cut at words: the wanted number of tokens, to within a word.
            at = int(random.integers(0, len(words) - SEQ_LEN))
            ids = tokenizer(" ".join(words[at : at + SEQ_LEN]))["input_ids"][: int(length) - around]
            half = len(ids) * 2 // 5
            parts = [tokenizer.decode(part).strip() or "so" for part in (ids[:half], ids[half:])]
            messages = [{"role": role, "content": part} for role, part in zip(("user", "assistant"), parts, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return tokenizer, model


def tokens_of_data(tokenizer: Any) -> dict[tuple[int, ...], int]:
    """Every conversation as its tokens -> how many of them, from the end, are trained."""
    found = {}
    for line in (FOLDER / "data.jsonl").read_text().splitlines():
        made = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert len(made["input_ids"]) <= SEQ_LEN, "a conversation would be cut"
        found[tuple(made["input_ids"])] = sum(made["assistant_masks"])
    return found


def check(contender: Contender, conversations: Mapping[tuple[int, ...], int], model: Any, begin: Sequence[int]) -> None:
    """Hold the first step of a contender against plain transformers; what differs becomes `problem`.

    Args:
        contender: has made its first step.
        conversations: of `tokens_of_data`.
        model: with the weights that everybody began with.
        begin: the tokens with which every conversation begins.
    """
    import torch

    if contender.problem:
        return
    ids = [token for row in contender.first["rows"] for token in row]
    starts = [at for at in range(len(ids)) if ids[at : at + len(begin)] == list(begin)]
    fed = [tuple(ids[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    if starts[:1] != [0] or any(each not in conversations for each in fed):
        strangers = sum(each not in conversations for each in fed)
        contender.problem = f"fed {strangers} of {len(fed)} conversations that are not in the data, token for token"
        return
    total, targets = 0.0, 0
    with torch.no_grad():
        for each in fed:
            count = conversations[each]
            logits = model(torch.tensor([each])).logits[0, -count - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(each[-count:]), reduction="sum"))
            targets += count
    contender.first["difference"] = abs(contender.first["loss"] - total / targets)
    contender.first["conversations"] = len(fed)
    if contender.first["engine"] != contender.expects:
        contender.problem = f"was moved by {contender.first['engine']} instead of {contender.expects}"
    elif not contender.first["difference"] <= TOLERANCE:
        contender.problem = f"loss {contender.first['loss']:.5f} where plain transformers has {total / targets:.5f}"


# -- the contenders -----------------------------------------------------------------------------------------------------


def common_settings(contender: Contender, run: Path) -> dict[str, Any]:
    """What a contender is told besides its own settings: the same in its words."""
    if contender.trainer == "axolotl":
        return {
            "output_dir": str(run),
            "micro_batch_size": contender.rows,
            "gradient_accumulation_steps": 1,
            "optimizer": "adamw_torch_fused",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler": "constant",
            "weight_decay": 0.01,
            "adam_beta2": 0.95,
            "max_grad_norm": 1.0,
            "max_steps": 100_000,
            "num_epochs": 1000,
            "logging_steps": 10,
            "save_strategy": "no",
            "bf16": False,
            "tf32": False,
            "seed": 0,
            "use_tensorboard": False,
        }
    return {
        "output_dir": str(run),
        "per_device_train_batch_size": contender.rows,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "adam_beta2": 0.95,
        "max_steps": 100_000,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
    }


def write_run_file(contender: Contender, run: Path) -> Path:
    path = run.with_suffix(".yaml")
    settings = {
        "model": {"path": str(FOLDER / "model")},
        "data": {
            "sources": [{"path": str(FOLDER / "data.jsonl"), "format": "messages"}],
            "seq_len": SEQ_LEN,
            "cache_folder": str(run / "data_cache"),
        },
        "train": {
            "stage": "sft",
            "max_steps": 100_000,
            "global_batch_size": contender.rows,
            "micro_batch_size": contender.rows,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "precision": "fp32",
            # It stands still while others have their turn.
            "hang_timeout_seconds": 7200,
            "collective_timeout_seconds": 8000,
        },
        "deepspeed": {"config": str(ROOT / "ds_configs" / "zero2.json")},
        "checkpoint": {"folder": str(run), "resume": "never"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def environment(name: str) -> tuple[Path, str]:
    """The interpreter of a peer's environment, made on the first call; and why it could not be made, or nothing."""
    folder = SCRATCH / f"peers_{name}"
    python, marker, wanted = folder / "bin" / "python", folder / "ready.txt", "\n".join(ENVIRONMENTS[name])
    if marker.exists() and marker.read_text() == wanted:
        return python, ""
    print(f"installing {wanted.splitlines()[-1 if '--no-deps' in wanted else 0]} into {folder.relative_to(ROOT)}")
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        packages = Path(site_packages(python))
        # What a peer does not bring itself (torch, DeepSpeed) is that of this project; its own come first.
        (packages / "beside.pth").write_text(f"import site; site.addsitedir({site_packages(Path(sys.executable))!r})\n")
        pip = [str(python), "-m", "pip", "-q"]
        subprocess.run([*pip, "install", *wanted.split()], check=True, capture_output=True, text=True, timeout=1800)
        # Their builds for CUDA cannot be loaded here. Only pictures and sound need them, but they are imported.
        subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio"], check=False, capture_output=True)
        (packages / "torchaudio.py").write_text('"""Stands in for a package that nothing here calls."""\n')
    except (subprocess.SubprocessError, OSError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        return python, f"cannot be installed: {[line for line in lines if 'ERROR' in line][:1] or lines[-1:]}"
    marker.write_text(wanted)
    return python, ""


def site_packages(python: Path) -> str:
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.check_output([str(python), "-c", asked], text=True).strip()


def own_contenders() -> list[Contender]:
    python = Path(sys.executable)
    ours: dict[str, Any] = {"who": "ds_trainer", "trainer": "ours", "python": python}
    return [
        Contender(**ours, how="default (packed)", settings=[], rows=ROWS),
        Contender(**ours, how="packing off", settings=["data.packing=false"]),
    ]


def groups(quick: bool) -> dict[str, list[Contender]]:
    """The contenders of each peer: as it comes first, then the best settings its documentation has for ragged chats."""
    found = {}
    for name, environment_name, settings in (
        (
            "HF Trainer",
            "trl",
            [
                ("hf", "default", {}, BATCH),
                ("hf", "by length", {"train_sampling_strategy": "group_by_length"}, BATCH),
                ("hf", "flattened", {"flatten": True}, BATCH),
            ],
        ),
        (
            "TRL",
            "trl",
            [
                ("trl", "default", {}, BATCH),
                ("trl", "packed, no checkpointing", {"packing": True, "gradient_checkpointing": False}, ROWS),
                (
                    "trl",
                    "by length, no checkpointing",
                    {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False},
                    BATCH,
                ),
            ],
        ),
        (
            "LLaMA-Factory",
            "llamafactory",
            [
                ("llamafactory", "default", {}, BATCH),
                ("llamafactory", "by length", {"train_sampling_strategy": "group_by_length"}, BATCH),
                ("llamafactory", "neat packing", {"neat_packing": True}, ROWS),
            ],
        ),
        (
            "axolotl",
            "axolotl",
            [
                ("axolotl", "default", {}, BATCH),
                ("axolotl", "packed", {"sample_packing": True, "attn_implementation": "sdpa"}, ROWS),
                ("axolotl", "by length", {"group_by_length": True}, BATCH),
            ],
        ),
    ):
        python, problem = environment(environment_name)
        found[name] = [
            Contender(who=name, how=how, trainer=trainer, python=python, settings=own, rows=rows, problem=problem)
            for trainer, how, own, rows in settings[: 2 if quick else None]
        ]
    for each in found["axolotl"]:
        each.expects = "LlamaForCausalLM"  # with DeepSpeed it asks for NCCL, which a CPU has not
    return found


# -- the run ------------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse_arguments(__doc__)
    turns = 1 if arguments.quick else TURNS
    peers = groups(arguments.quick)
    shutil.rmtree(FOLDER, ignore_errors=True)  # axolotl keeps what it tokenised by the path of the data, whatever is in it
    tokenizer, model = make_material(turns * STEPS * BATCH)
    conversations, begin = tokens_of_data(tokenizer), tokenizer(f"{BEGIN}user\n")["input_ids"]
    ports = iter(range(29600, 29700))

    def start(contenders: Sequence[Contender]) -> None:
        """One after the other; together in a quick run, which then says nothing about the time of a start."""
        together = [contenders] if arguments.quick else [[each] for each in contenders]
        for some in together:
            for each in some:
                each.start(tokenizer.pad_token_id, next(ports))
            for each in some:
                each.warmed_up()
                check(each, conversations, model, begin)
                if each.problem:
                    print(f"{each.who}, {each.how}: {each.problem}", flush=True)

    own = own_contenders()
    goals: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    try:
        start(own)
        if problems := [f"{each.how}: {each.problem}" for each in own if each.problem]:
            sys.exit(f"ds_trainer, {'; '.join(problems)}")
        for name, contenders in peers.items():
            started = [each for each in contenders if not each.problem]
            start(started)
            here = len(own[0].turns)
            for _ in range(turns):
                for each in (*(own if here == 0 else own[:1]), *started):
                    each.turn()
            for each in started:
                each.end()
            rows_of_group, goals_of_group = judged(name, own, contenders, here)
            rows += rows_of_group
            goals += goals_of_group
    finally:
        for each in own:
            each.end()
    everybody = [*own, *(each for contenders in peers.values() for each in contenders)]
    tables = [
        {
            "title": "Useful tokens a second, one thread",
            "columns": [
                "who",
                "setting",
                "tokens/s, CPU",
                "tokens/s, wall",
                "CPU ms a step",
                "useful share",
                "ours in its turns = 1",
            ],
            "rows": [[*measured(each), each.rate("tokens", "cpu_s") / own[0].rate("tokens", "cpu_s")] for each in own] + rows,
        },
        {
            "title": "The first step: its loss and how far that is from plain transformers, and what it took to get there",
            "columns": ["who", "setting", "moved by", "loss", "difference", "CPU s", "wall s", "peak RSS, MiB"],
            "rows": [begun(each) for each in everybody if each.first and "loss" in each.first],
        },
    ]
    left_out = [f"Not measured: {each.who}, {each.how}: {each.problem}." for each in everybody if each.problem]
    finish(
        "peers_sft",
        quick=arguments.quick,
        goals=goals,
        tables=tables,
        packages=versions("torch", "deepspeed", "transformers", "accelerate") | peers_versions(),
        notes=left_out,
        seed=0,
    )


def judged(name: str, own: Sequence[Contender], contenders: Sequence[Contender], begun_at: int) -> tuple[list[Any], list[Any]]:
    """The rows and goals of one peer, against our default in the turns of the same rounds.

    Args:
        name: of the peer.
        own: our contenders, the default first.
        contenders: the peer's, the default first.
        begun_at: how many turns ours had before.
    """
    ours = own[0].rate("tokens", "cpu_s", begun_at)
    speeds = {each.how: each.rate("tokens", "cpu_s") for each in contenders if each.turns and not each.problem}
    goals = []
    if "default" in speeds:
        what = f"useful tokens a CPU second, ours against {name}, default"
        goals.append(goal(what, 2.0, ours / speeds["default"], "times", at_least=True))
    if speeds:
        best = max(speeds, key=lambda how: speeds[how])
        what = f"useful tokens a CPU second, ours against the best of {name} ({best})"
        goals.append(goal(what, 1.05, ours / speeds[best], "times", at_least=True))
    return [[*measured(each), each.rate("tokens", "cpu_s") / ours] for each in contenders if each.turns], goals


def measured(contender: Contender) -> list[Any]:
    return [
        contender.who,
        contender.how + (", no DeepSpeed" if contender.expects == "LlamaForCausalLM" else ""),
        contender.rate("tokens", "cpu_s"),
        contender.rate("tokens", "wall_s"),
        1000 * contender.rate("cpu_s", "steps"),
        contender.rate("tokens", "positions"),
    ]


def begun(contender: Contender) -> list[Any]:
    first, turns = contender.first, contender.turns
    return [
        contender.who,
        contender.how,
        first["engine"],
        f"{first['loss']:.4f}",
        f"{first['difference']:.1e}" if "difference" in first else "-",
        first["cpu_s"],
        first["wall_s"],
        turns[-1]["peak_rss"] / MIB if turns else None,
    ]


def peers_versions() -> dict[str, str]:
    pinned = [each.partition("==") for listed in ENVIRONMENTS.values() for each in listed if each != TORCH]
    return {name: version for name, equals, version in pinned if equals}


if __name__ == "__main__":
    main()
