"""Training loops in processes of their own that make steps when they are told to, so that they can be timed in turns.

`ours` is the command `ds_trainer train` itself, held up between two steps; `bare` is a loop around `deepspeed.initialize`
written by hand, `torch` the same without DeepSpeed. All of them feed the same rows laid out alike to the same model with the
same loss and the same optimizer. What the others are given for nothing: their rows lie ready in memory, the targets of each
step are counted ahead, and they log nothing.
"""

from __future__ import annotations

import cProfile
import gc
import json
import os
import pstats
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

from common import child_environment, resident, times

SMALL = ("5.3 M", 256, 4)
LARGE = ("29.5 M", 512, 8)
OFFLOAD = {
    "zero_optimization": {"offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
}
"""torch's AdamW for the offloaded state too, so that nothing is compiled."""
SENTENCE = "the model reads a row of tokens and predicts the next one from all before it"
AHEAD = 400
"""Steps for which the rows of the other loops lie ready; then they begin anew."""


def llama(hidden: int, layers: int, *, vocabulary: int = 8192, positions: int = 4096) -> dict[str, Any]:
    """A Llama with tied embeddings and heads of 64 (of 16 below that)."""
    heads = hidden // 64 or 4
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 43 * hidden // 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def write_texts(folder: Path) -> Path:
    """A corpus with a tokenizer whose texts fill rows without padding to speak of."""
    from helpers import write_corpus

    folder.mkdir(parents=True, exist_ok=True)
    write_corpus(folder)
    words = SENTENCE.split()
    texts = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(20 + i * 11 % 190)) for i in range(1500)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def write_case(
    corpus: Path,
    folder: Path,
    name: str,
    *,
    model: Mapping[str, Any],
    micro: int,
    seq_len: int,
    stage: int,
    accumulation: int = 1,
    precision: str = "bf16",
    offload: bool = False,
    log_every: int = 10,
    bucket: int | None = None,
) -> Path:
    """The run file of a case; `ours` runs it, the others read from it what they train on."""
    from helpers import write_run

    deepspeed: dict[str, Any] = {"zero_optimization": {"stage": stage}}
    if bucket is not None:
        deepspeed["zero_optimization"]["reduce_bucket_size"] = bucket
    if offload:
        deepspeed["zero_optimization"] |= OFFLOAD["zero_optimization"]
        deepspeed["optimizer"] = OFFLOAD["optimizer"]
    return write_run(
        corpus,
        folder,
        name,
        model={"config": dict(model), "tokenizer": str(corpus / "tokenizer")},
        data={"seq_len": seq_len, "cache_folder": str(folder / "cache")},
        train={
            "max_steps": 1_000_000,  # it is ended before
            "global_batch_size": None,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-3,
            "precision": precision,
            "hang_timeout_seconds": 3000,
            "collective_timeout_seconds": 3600,
        },
        deepspeed=deepspeed,
        monitor={"log_every_steps": log_every},
    )


# -- the side that tells ------------------------------------------------------------------------------------------------


class Live:
    """A training loop in processes of its own, one a rank."""

    def __init__(self, who: str, config: Path, *, ranks: int = 1, **options: Any) -> None:
        self.who = who
        self._log = config.with_name(f"{config.stem}_{who}_{time.monotonic_ns()}.log")
        address = f"/tmp/ds_trainer_bench_{os.getpid()}_{time.monotonic_ns()}"  # the path of a socket must be short
        self._listener = Listener(address, "AF_UNIX", authkey=b"bench")
        command = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), __file__, who, address, str(config)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, json.dumps(options)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=child_environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                start_new_session=True,
            )
        self._wires: list[Connection] = []
        self._ranks = ranks

    def __enter__(self) -> Live:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for wire in self._wires:
            try:
                wire.send("end")
            except OSError:
                continue
        self._listener.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()

    def ready(self) -> Live:
        """Wait until all ranks stand before their first step.

        Raises:
            RuntimeError: the loop ended before.
        """
        # A rank that fails never comes: look at its launcher now and then.
        self._listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
        while len(self._wires) < self._ranks:
            try:
                self._wires.append(self._listener.accept())
            except TimeoutError:
                self._still_there()
        return self

    def ask(self, what: Any) -> list[Any]:
        """Ask every rank, and wait for the answers.

        Raises:
            RuntimeError: the loop ended instead.
        """
        try:
            for wire in self._wires:
                wire.send(what)
            return [wire.recv() for wire in self._wires]
        except (EOFError, OSError):
            self._process.wait()
            raise self._failed() from None

    def turn(self, steps: int) -> tuple[float, float]:
        """Make so many steps: seconds of one, CPU of all ranks together and wall."""
        answers = self.ask(steps)
        return sum(cpu for cpu, _ in answers) / steps, max(wall for _, wall in answers) / steps

    def losses(self) -> list[float]:
        """Of every step so far, over all ranks."""
        return [sum(each) for each in zip(*self.ask("losses"), strict=True)]

    def _still_there(self) -> None:
        if self._process.poll() is not None:
            raise self._failed()

    def _failed(self) -> RuntimeError:
        return RuntimeError(f"{self.who} ended:\n{self._log.read_text()[-3000:]}")


def compare(
    lives: Mapping[str, Live], *, steps: int, turns: int, warm_up: int, equal: Sequence[str] = (), falls: bool = True
) -> tuple[dict[str, dict[str, Any]], int]:
    """Time loops in turns, after their losses were compared.

    Args:
        lives: by name; the first one is what the ratios are to.
        steps: of a turn.
        turns: of each.
        warm_up: steps before, untimed.
        equal: names of those whose losses must be equal in every bit.
        falls: and must be lower at the end than at the beginning.

    Returns:
        By name: `times`, and with `ratio` and `ratio_wall` the medians of the ratios to the first one's turn beside it; and
        how many steps' losses were compared.

    Raises:
        AssertionError: losses differ.
    """
    for live in lives.values():
        live.ready()
    for live in lives.values():
        live.turn(warm_up)
    require_equal({name: lives[name].losses() for name in equal}, falls=False)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in lives}
    for turn in range(turns):
        for name in list(lives)[:: 1 if turn % 2 == 0 else -1]:  # A B B A: nobody always comes after the same other
            seconds[name].append(lives[name].turn(steps))
    compared = require_equal({name: lives[name].losses() for name in equal}, falls=falls)
    first = next(iter(seconds.values()))
    found = {}
    for name, each in seconds.items():
        cpu, wall = zip(*each, strict=True)
        found[name] = times(cpu, wall)
        for column, ratio in enumerate(("ratio", "ratio_wall")):
            found[name][ratio] = statistics.median(own[column] / base[column] for own, base in zip(each, first, strict=True))
    return found, compared


def require_equal(losses: Mapping[str, Sequence[float]], *, falls: bool = True) -> int:
    """Losses of several loops must be the same in every bit; how many there are.

    Raises:
        AssertionError: they are not, or do not fall.
    """
    if not losses:
        return 0
    first, *others = losses
    for name in others:
        differing = [index for index, pair in enumerate(zip(losses[first], losses[name], strict=True)) if pair[0] != pair[1]]
        assert not differing, (
            f"{first} and {name} differ from step {differing[0] + 1} on: "
            f"{losses[first][differing[0]]!r}, {losses[name][differing[0]]!r}"
        )
    assert not falls or losses[first][-1] < losses[first][0], f"the loss of {first} does not fall: {losses[first]}"
    return len(losses[first])


# -- the side that is told ----------------------------------------------------------------------------------------------


class Gate:
    """Where a loop waits between two steps."""

    def __init__(self, address: str) -> None:
        self._wire = Client(address, "AF_UNIX", authkey=b"bench")
        self._left = 0
        self._begun: tuple[float, float] | None = None
        self.losses: list[Any] = []
        self._profile = cProfile.Profile()
        self.answers: dict[str, Callable[[], Any]] = {
            "losses": lambda: [float(loss) for loss in self.losses],
            "profile": self._profile.enable,
            "profiled": self._profiled,
            "peak": lambda: resident("VmHWM"),
            "faults": lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        }

    def __call__(self) -> int:
        """Before each step."""
        if self._left == 0:
            if self._begun is not None:
                self._wire.send((time.process_time() - self._begun[0], time.perf_counter() - self._begun[1]))
            try:
                while not isinstance(asked := self._wire.recv(), int):
                    if asked == "end":
                        os._exit(0)
                    self._wire.send(self.answers[asked]())
            except EOFError:
                os._exit(1)
            self._left = asked
            self._begun = time.process_time(), time.perf_counter()
        self._left -= 1
        return 0

    def _profiled(self) -> dict[str, tuple[int, float]]:
        """Function -> calls and seconds in the function itself, since "profile" was asked."""
        self._profile.disable()
        found = {}
        for (path, line, name), (_, calls, seconds, *_) in pstats.Stats(self._profile).stats.items():  # type: ignore[attr-defined]
            where = "/".join(Path(path).parts[-3:])
            found[f"{where}:{line} {name}" if line else name] = (calls, seconds)
        return found


def ours(gate: Gate, config: Path, options: dict[str, Any]) -> None:
    """`ds_trainer train`, whole: its loop asks between two steps whether to stop, and waits there."""
    from ds_trainer import cli, loop

    plain = loop.train

    def gated(engine: Any, windows: Any, state: Any, plan: Any, recorder: Any, after_step: Any, stop: Any, **more: Any) -> int:
        record = recorder.step

        def step(**fields: Any) -> None:
            gate.losses.append(fields["loss"])
            record(**fields)

        recorder.step = step
        if options.get("bytes"):
            watch_bytes(gate, engine)
        return plain(engine, windows, state, plan, recorder, after_step, lambda: gate() or stop(), **more)

    loop.train = gated
    raise SystemExit(cli.main(["train", "--config", str(config)]))


def bare(gate: Gate, config: Path, options: dict[str, Any]) -> None:
    """The loop that DeepSpeed's documentation shows, with the exact mean over the tokens of a step."""
    import deepspeed
    import torch
    import torch.distributed as dist
    import yaml

    run = yaml.safe_load(config.read_text())
    own_loss = options.get("own_loss", False)
    windows, totals, model, groups = given(config, own_loss=own_loss, ahead=options.get("ahead", AHEAD))
    train = run["train"]
    accumulation = train["gradient_accumulation_steps"]
    zero = run["deepspeed"]["zero_optimization"]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=train["learning_rate"], betas=(0.9, 0.95), eps=1e-8, fused=True),
        config={
            "train_micro_batch_size_per_gpu": train["micro_batch_size"],
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": train["precision"] == "bf16"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    scale = accumulation * dist.get_world_size()
    step = 0
    while True:
        gate()
        window, num_targets = windows[step % len(windows)], totals[step % len(windows)]
        loss = torch.zeros(())
        for batch in window:
            if own_loss:
                nll = engine(input_ids=batch.inputs["input_ids"], labels=batch.inputs["input_ids"], use_cache=False).loss
                engine.backward(nll)
                loss += nll.detach() / accumulation
            else:
                nll = engine(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets)
                engine.backward(nll * (scale / num_targets))
                loss += nll.detach() / num_targets
            engine.step()
        gate.losses.append(loss)
        step += 1


def plain_torch(gate: Gate, config: Path, options: dict[str, Any]) -> None:
    """The same without DeepSpeed; in bf16 without fp32 copies of the weights, so its losses are others."""
    import torch
    import yaml

    train = yaml.safe_load(config.read_text())["train"]
    windows, totals, model, groups = given(config, own_loss=False, ahead=AHEAD)
    optimizer = torch.optim.AdamW(groups, lr=train["learning_rate"], betas=(0.9, 0.95), eps=1e-8, fused=True)
    parameters = list(model.parameters())
    step = 0
    while True:
        gate()
        window, num_targets = windows[step % len(windows)], totals[step % len(windows)]
        loss = torch.zeros(())
        for batch in window:
            nll = model(**batch.inputs, target_positions=batch.target_positions, targets=batch.targets)
            (nll / num_targets).backward()
            loss += nll.detach() / num_targets
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.losses.append(loss)
        step += 1


def given(config: Path, *, own_loss: bool, ahead: int) -> tuple[list[Any], list[int], Any, list[dict[str, Any]]]:
    """What the loops that are not ours start from: rows, targets of each step over all ranks, the model, its two groups.

    Args:
        config: the run file.
        own_loss: leave the model's own loss, and its own attention, as they are.
        ahead: steps whose rows are read.
    """
    import deepspeed
    import torch.distributed as dist

    from ds_trainer.arguments.merge import resolve
    from ds_trainer.assemble import prepare
    from ds_trainer.engine.build import prepare_deepspeed
    from ds_trainer.engine.optim import parameter_groups
    from ds_trainer.launch.detect import detect_launch
    from ds_trainer.model import attention, load
    from ds_trainer.objectives import language_model
    from ds_trainer.run_data import read_windows
    from ds_trainer.state import TrainState

    launch = detect_launch(dict(os.environ))
    resolved = resolve(config)
    prepared = prepare(resolved, launch, lambda line: None)
    prepare_deepspeed(prepared.device, launch.local_world_size)
    deepspeed.init_distributed("gloo")
    reading = read_windows(
        resolved,
        prepared.data,
        prepared.batch,
        prepared.plan,
        TrainState(),
        lambda batch: attention.arrange(batch, prepared.attention),
        rank=launch.rank,
        data_parallel_size=launch.world_size,
        report=lambda line: None,
    )
    windows = list(islice(reading, ahead))
    reading.close()
    counts = [sum(batch.num_targets for batch in window) for window in windows]
    gathered: list[list[int]] = [[]] * launch.world_size
    dist.all_gather_object(gathered, counts)
    attention.register_document_attention()
    train = resolved.settings.train
    model = load.build_model(
        prepared.model_config, precision=train.precision, attention="sdpa" if own_loss else prepared.attention
    )
    load.initialize_weights(model, train.seed)
    if not own_loss:
        language_model.attach(model, chunked=True)
    model.train()
    return windows, [sum(each) for each in zip(*gathered, strict=True)], model, parameter_groups(model, train)


def watch_bytes(gate: Gate, engine: Any) -> None:
    """Let ours answer what its tensors take: at most after a backward pass, and now, between two steps."""
    micro_step = engine.micro_step
    after_backward: list[int] = []

    def watched(*inputs: Any) -> Any:
        loss = micro_step(*inputs)
        after_backward.append(live_bytes(engine.model))
        return loss

    engine.micro_step = watched
    gate.answers["seen"] = lambda: (max(after_backward), live_bytes(engine.model))


def live_bytes(model: Any) -> int:
    """Bytes of all tensors in this process; those that share their memory are counted once."""
    import torch

    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    found += [each.grad for each in model.parameters() if each.grad is not None]  # held by autograd, not by Python
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found if each.device.type == "cpu"
    }
    return sum(storages.values())


if __name__ == "__main__":
    who, address, config_path, its_options = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).parent))
    {"ours": ours, "bare": bare, "torch": plain_torch}[who](Gate(address), Path(config_path), json.loads(its_options))
