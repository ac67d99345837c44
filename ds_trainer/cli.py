"""The words of the command line: subcommands in, exit code out. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import atexit
import dataclasses
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ds_trainer import __version__
from ds_trainer.errors import (
    EXIT_BY_SIGNAL,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_REFUSED,
    ArgumentsError,
    DsTrainerError,
    HangError,
    LauncherError,
    RefusedError,
    ResumeError,
    TrainingError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ds_trainer.arguments.merge import Resolved
    from ds_trainer.launch.commands import Commands
    from ds_trainer.launch.detect import Launch
    from ds_trainer.monitor.run_folder import RunFolder
    from ds_trainer.monitor.signals import StopRequests

_BEGUN = time.monotonic()
"""When this process began, but for the interpreter's own start."""

_LOST_PEER = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""What gloo and NCCL say when a process at the other end is gone."""

_LEFT_ALONE = (
    "lost the connection to another rank, which ended without a word. Was it killed, for want of memory perhaps? "
    "`dmesg` on its host and the launcher's lines tell."
)
_WAIT_FOR_SPEAKER_SECONDS = 5.0
"""Much longer than the starts of two ranks on one busy machine lie apart."""

_ending = threading.Lock()

app = typer.Typer(
    name="ds_trainer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train and fine-tune language models with DeepSpeed.\n\n"
    "A run file (YAML) says what to train, a DeepSpeed JSON how the engine works; `check` shows what both come to.\n\n"
    "  torchrun --nproc-per-node 8 -m ds_trainer train --config run.yaml\n\n"
    "  deepspeed --num_gpus 8 --module ds_trainer train --config run.yaml\n\n"
    "  ds_trainer debug --config run.yaml",
)

Config = Annotated[Path, typer.Option("--config", help="The run file (YAML).", show_default=False)]
DeepSpeedJson = Annotated[
    Path | None, typer.Option("--deepspeed", help="A DeepSpeed JSON; replaces deepspeed.config of the run file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that overrule the files, as section.key=value.", metavar="[SECTION.KEY=VALUE]..."),
]
Sets = Annotated[list[str] | None, typer.Option("--set", help="The same as section.key=value, as an option.")]


class Precision(StrEnum):
    """What an export can be written in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ds_trainer {__version__}")
        raise typer.Exit


@app.callback()
def _before_subcommand(
    context: typer.Context,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    # The `deepspeed` launcher and torch.distributed.launch write --local_rank before the subcommand.
    context.obj = local_rank


@app.command()
def train(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="auto, never, or a checkpoint's folder; overrules checkpoint.resume.")
    ] = None,
) -> None:
    """Train: started by `torchrun` or `deepspeed`, one process a device.

    Continues from the newest complete checkpoint of the run folder by itself.
    """
    from ds_trainer.launch.detect import check_local_rank_argument, detect_launch

    launch = detect_launch(dict(os.environ), commands=_commands())
    check_local_rank_argument(launch, context.obj)
    resolved = _resolve(config, deepspeed, overrides, sets, resume)

    def story(folder: RunFolder, console: Console, requests: StopRequests) -> tuple[str, int]:
        from ds_trainer.monitor.progress import Progress
        from ds_trainer.train import train

        def hung(error: BaseException) -> NoReturn:
            _account_for(error, folder, launch, console, _continue_command(resolved, launch))

        progress = Progress(console if launch.rank == 0 else None)
        state, stopped = train(resolved, launch, folder, progress, requests, on_hang=hung)
        return (
            f"done: {state.step} steps, {state.rows_consumed} rows. Everything is in {folder.path}; as a Hugging Face model:\n"
            f"  ds_trainer export --run {folder.path} --to {folder.path / 'export'}"
        ), stopped

    _run_in_folder(resolved, launch, story)


@app.command()
def debug(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps to run.")] = 3,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show, decoded, with the trained tokens marked.")] = 2,
    pdb: Annotated[bool, typer.Option("--pdb", help="Open the debugger where an exception was raised.")] = False,
) -> None:
    """Run the first steps in this one process, without a launcher: for breakpoints in any line, or a quick look.

    The engine is the same: real DeepSpeed, the configured ZeRO stage and offload. Nothing is saved.
    """
    launch = _single_process()
    resolved = _resolve(config, deepspeed, overrides, sets, "never")

    from ds_trainer.debug import debug
    from ds_trainer.monitor import logs
    from ds_trainer.monitor.run_folder import RunFolder

    folder = RunFolder(Path(resolved.settings.checkpoint.folder) / "debug", 0)
    folder.create()
    logs.quiet_loggers(folder.log)
    try:
        debug(resolved, launch, folder, logs.terminal(), steps=steps, show_rows=rows)
    except DsTrainerError as error:
        if pdb:
            print(f"ds_trainer: {error}", file=sys.stderr, flush=True)
            _post_mortem()
            raise typer.Exit(error.exit_code) from None
        raise
    except Exception:
        from rich.console import Console

        Console(stderr=True).print_exception(show_locals=False, extra_lines=1)
        if pdb:
            _post_mortem()
        raise typer.Exit(EXIT_FAILED) from None


@app.command()
def check(
    config: Annotated[Path | None, typer.Option("--config", help="The run file (YAML).", show_default=False)] = None,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks to solve the batch arithmetic for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the run file and exit.")] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Leave out what needs DeepSpeed: its own check of nested blocks.")
    ] = False,
) -> None:
    """Show the settings in force, each with the file and line it comes from. Needs no launcher and no GPU."""
    import json

    if schema:
        from ds_trainer.arguments.schema import RunSettings

        typer.echo(json.dumps(RunSettings.model_json_schema(), indent=1))
        return
    if config is None:
        raise RefusedError("check needs a run file: ds_trainer check --config run.yaml")
    resolved = _resolve(config, deepspeed, overrides, sets, None)
    if not static:
        _validate_blocks(resolved)

    from ds_trainer import check as story
    from ds_trainer.launch.commands import visible_devices

    device = "cuda" if visible_devices(os.environ) else "cpu"
    if as_json:
        typer.echo(json.dumps(story.as_json(resolved, world_size, device), indent=1))
    else:
        typer.echo(story.as_text(resolved, world_size, device))


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines, all alike.")] = 1,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of a node; by default those seen here.")] = None,
    cpu_ranks: Annotated[
        int | None, typer.Option("--cpu-ranks", min=1, help="Ranks of a node that train on the CPU, instead of --gpus.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option("--gpu-memory", help="Of one GPU, such as 80GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option("--host-memory", help="Of one node, such as 1TiB.")] = None,
    nvme: Annotated[str | None, typer.Option("--nvme", help="Local disk of one node for offload, such as 4TiB.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Compare all ZeRO stages and offloads in one table.")] = False,
    tflops: Annotated[
        float | None,
        typer.Option("--tflops", min=0.001, help="What a GPU achieves, in 10^12 operations a second: for time and price."),
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0.0, help="Of a GPU for an hour; needs --tflops.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what a run will take on a cluster, before it is paid for: memory, steps, traffic, time; and what makes it fit.

    Needs no GPU and no weights. Exits with 8, as a run that is out of memory does, when it does not fit.
    """
    if price is not None and tflops is None:
        raise RefusedError("--price needs --tflops: the price follows from the time. Add for example --tflops 400.")
    from ds_trainer.launch.commands import visible_devices
    from ds_trainer.monitor.logs import hushed
    from ds_trainer.plan.cluster import asked_cluster

    with hushed():
        from ds_trainer.plan import render, story

        cluster, notes = asked_cluster(
            nodes=nodes,
            gpus=gpus,
            cpu_ranks=cpu_ranks,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            nvme=nvme,
            visible=visible_devices(os.environ),
            here=story.memory_here,
        )
        request = story.Request(
            config=config,
            deepspeed=deepspeed,
            overrides=(*(overrides or []), *(sets or [])),
            cluster=cluster,
            notes=tuple(notes),
        )
        planned = story.make_plan(request)
        changes = [] if planned.fits else story.changes_that_fit(planned)
        rows = story.sweep(request) if sweep else []
    if as_json:
        import json

        typer.echo(json.dumps(render.as_json(planned, changes=changes, rows=rows, tflops=tflops, price=price), indent=1))
    else:
        typer.echo(render.as_text(planned, changes=changes, rows=rows, tflops=tflops, price=price))
    if not planned.fits:
        raise typer.Exit(EXIT_OUT_OF_MEMORY)


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Samples of each source to print, trained tokens coloured.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes that tokenise; by default one for each core.")
    ] = None,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks to count the steps of the run for.")] = 1,
) -> None:
    """Tokenise and pack the data ahead of the run, and show what became of every record.

    Needs no launcher and no GPU. What is done is kept: killed, it goes on where it was; `train` finds it and starts at once.
    Unlike `train`, which stops at the first bad records, it reads to the end and lists them all.
    """
    resolved = _resolve(config, deepspeed, overrides, sets, None)

    from ds_trainer.monitor import logs
    from ds_trainer.prepare import prepare as story

    console = logs.terminal()
    try:
        with logs.hushed():
            story(resolved, console, world_size=world_size, show=show, workers=workers)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from where this one was, but for the last few seconds", markup=False)
        raise typer.Exit(EXIT_BY_SIGNAL + signal.SIGINT) from None


@app.command()
def export(
    run: Annotated[Path, typer.Option("--run", help="The run folder.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The folder to write.", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Such as step_00000100; by default the newest complete one.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write base and adapter as one model.")] = False,
    precision: Annotated[Precision | None, typer.Option("--precision", help="By default that of the run.")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder, on the CPU, and prove that it computes the same loss."""
    from ds_trainer.monitor import logs

    console = logs.terminal()
    with logs.hushed():
        from ds_trainer.export import export

        export(
            run,
            to,
            checkpoint=checkpoint,
            merge=merge,
            precision=precision.value if precision else None,
            report=lambda line: console.print(line, markup=False),
        )


@app.command()
def verify(
    run: Annotated[Path | None, typer.Argument(help="The run folder whose checkpoints are read.", show_default=False)] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Prove that a run of --config goes on exactly: train, kill, resume, compare."),
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", help="The run file, for --resume.", show_default=False)] = None,
    deepspeed: DeepSpeedJson = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A setting that overrules the files, for --resume.")] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help="What starts a module, for --resume: 'deepspeed --hostfile hosts --module'. By default torchrun here.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps before the checkpoint, and after it, for --resume.")] = 3,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds for each of the two starts of --resume.")] = 1800,
) -> None:
    """Check that every checkpoint of a run is whole, byte for byte, and say which one a start would take.

    With --resume, prove before a long run that it can be killed and resumed on this machine without a trace: it is trained for
    some steps, killed without warning, started again, and what both starts computed is compared bit for bit.
    """
    from ds_trainer.monitor.logs import terminal
    from ds_trainer.verify import verify_resume, verify_run

    console = terminal()

    def report(line: str) -> None:
        console.print(line, markup=False)

    if not resume:
        if run is None:
            raise RefusedError(
                "verify needs a run folder: ds_trainer verify out/my-run; or a proof: verify --resume --config run.yaml"
            )
        verify_run(run, report)
        return
    if config is None:
        raise RefusedError("verify --resume needs a run file: ds_trainer verify --resume --config run.yaml")
    words = ["--config", str(config), *(["--deepspeed", str(deepspeed)] if deepspeed else [])]
    words += [word for each in sets or [] for word in ("--set", each)]
    verify_resume(
        _resolve(config, deepspeed, None, sets, None),
        launch or f"torchrun --nproc-per-node {_commands().process_count} -m",
        arguments=words,
        steps=steps,
        timeout=timeout,
        report=report,
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code. An error of the user's is printed without a traceback.

    Raises:
        SystemExit: typer's way to end a command; with code 2 when it does not understand the command line.
    """
    words = sys.argv[1:] if argv is None else argv
    words = [word for word in words if not re.match(r"--local[_-]rank=", word)]
    if words and words[0].startswith("--") and words[0] not in ("--help", "--version", "--local_rank", "--local-rank"):
        print(f"ds_trainer: a subcommand comes first: ds_trainer train {' '.join(words)}", file=sys.stderr)
        return EXIT_REFUSED
    try:
        app(args=argv, prog_name="ds_trainer")
    except DsTrainerError as error:
        if _speaks_up(error):
            print(f"ds_trainer: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_DONE


def _speaks_up(error: DsTrainerError) -> bool:
    """Print an error once, not once a rank.

    What every rank finds they all refuse, and one of them says so. The others wait for the launcher to end them: if one left
    first, the launcher would end the one that speaks before it has spoken. Should only another rank have met the error,
    nothing ends that one while it waits here, and it speaks for itself.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    if isinstance(error, LauncherError):
        from ds_trainer.launch.detect import prints_refusal

        speaks = prints_refusal(error, os.environ)
    if not speaks:
        time.sleep(_WAIT_FOR_SPEAKER_SECONDS)
    return speaks or not isinstance(error, LauncherError)


def _commands() -> Commands:
    from ds_trainer.launch.commands import Commands, visible_devices

    return Commands(arguments=tuple(sys.argv[1:]), device_count=visible_devices(os.environ))


def _resolve(
    config: Path, deepspeed: Path | None, overrides: list[str] | None, sets: list[str] | None, resume: str | None
) -> Resolved:
    from ds_trainer.arguments.merge import resolve

    return resolve(config, deepspeed=deepspeed, overrides=[*(overrides or []), *(sets or [])], resume=resume)


def _validate_blocks(resolved: Resolved) -> None:
    """DeepSpeed's own check of its nested blocks, without the words it says when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ds_trainer.arguments.deepspeed_keys import validate_blocks
    from ds_trainer.monitor.logs import hushed

    with hushed():
        problems = validate_blocks(resolved.deepspeed)
    if problems:
        raise ArgumentsError(problems)


def _single_process() -> Launch:
    """Make this process a world of one, whatever the shell left behind."""
    import socket

    from ds_trainer.launch.detect import single_process

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    single = single_process(dict(os.environ), port=port, commands=_commands())
    for name in single.remove:
        del os.environ[name]
    os.environ.update(single.assign)
    return single.launch


def _run_in_folder(
    resolved: Resolved, launch: Launch, story: Callable[[RunFolder, Console, StopRequests], tuple[str, int]]
) -> NoReturn:
    """Run a story with its output in the run folder, and account there for how it ended."""
    from ds_trainer.checkpoint.layout import newest_step
    from ds_trainer.monitor import logs
    from ds_trainer.monitor.parents import Parents
    from ds_trainer.monitor.progress import Progress
    from ds_trainer.monitor.run_folder import RunFolder
    from ds_trainer.monitor.signals import RANK_GONE, StopRequests

    parents = Parents.now()
    folder = RunFolder(Path(resolved.settings.checkpoint.folder), launch.rank)
    folder.create()
    _check_resume(resolved, folder)
    console = logs.terminal()
    if launch.rank == 0:
        folder.lock()
        folder.clear_errors()
    logs.to_log_file(folder.log)
    command = _continue_command(resolved, launch)

    code: int | None = None
    """What this process leaves with; None while it works."""

    def end_at_once(reason: int) -> None:
        if code is not None:  # all is said; what still hangs is a tracker that sends the last of what it holds
            os._exit(code)
        if reason == RANK_GONE:
            _account_for(TrainingError(_LEFT_ALONE), folder, launch, console, command)
        stopped = Stopped(reason, nothing_lost=not requests.training)
        if launch.rank and not _ranks_have_met():
            # The folder may be another start's, and rank zero refused for that: nothing is written into it.
            os._exit(stopped.exit_code)
        _account_for(stopped, folder, launch, console, command)

    limit = resolved.settings.train.max_seconds
    requests = StopRequests(
        end=end_at_once,
        say=Progress(console if launch.rank == 0 else None).say,
        a_rank_failed=folder.first_failure.exists,
        parents=parents,
        deadline=_BEGUN + limit if limit and launch.rank == 0 else None,
    )
    requests.watch()
    try:
        last_word, stopped = story(folder, console, requests)
    except BaseException as error:
        _account_for(error, folder, launch, console, command)
    _ending.acquire()
    ending = EXIT_PREEMPTED if stopped else EXIT_DONE
    if launch.rank == 0:
        step = newest_step(folder.checkpoints)
        reason = _why_stopped(stopped, limit) if stopped else "done"
        folder.finish(ending, reason, step=step, command=command)
        console.print(f"ds_trainer: {reason}. {_onwards(step)} with: {command}" if stopped else last_word, markup=False)
    code = ending
    _leave(code)


def _why_stopped(reason: int, limit: int | None) -> str:
    """Why a run ended before its time, all ranks together."""
    from ds_trainer.monitor.signals import TIME_IS_UP, in_words

    return f"train.max_seconds = {limit} is over" if reason == TIME_IS_UP else f"stopped by {in_words(reason)}"


def _onwards(step: int | None) -> str:
    return f"The run goes on from step {step}" if step else "There is no checkpoint yet: the run starts anew"


def _ranks_have_met() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _check_resume(resolved: Resolved, folder: RunFolder) -> None:
    """Refuse a checkpoint that is not there before anything is built."""
    resume = resolved.settings.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        from ds_trainer.checkpoint.layout import complete_checkpoints

        there = [str(path) for path in complete_checkpoints(folder.checkpoints)]
        raise ResumeError(
            f"checkpoint.resume = {resume}: write auto, never or the folder of a checkpoint. "
            + (f"This run has {', '.join(there)}." if there else f"{folder.checkpoints} holds none.")
        )


class Stopped(BaseException):
    """This process is asked to end at once."""

    def __init__(self, reason: int, *, nothing_lost: bool) -> None:
        """Take the reason.

        Args:
            reason: a signal's number, or one of `monitor.signals`.
            nothing_lost: no step was being worked on; a start by a scheduler may simply be repeated.
        """
        from ds_trainer.monitor.signals import LAUNCHER_GONE, in_words

        super().__init__(f"stopped by {in_words(reason)}" + (" before training" if nothing_lost else ", at once"))
        number = signal.SIGTERM if reason == LAUNCHER_GONE else reason
        again = nothing_lost and number != signal.SIGINT  # who presses Ctrl-C wants no requeue
        self.exit_code = EXIT_PREEMPTED if again else EXIT_BY_SIGNAL + number


def _continue_command(resolved: Resolved, launch: Launch) -> str:
    """What goes on where this start ends: the same command, without a `--resume` that would go back."""
    arguments = list(sys.argv[1:])
    for index in reversed([index for index, each in enumerate(arguments) if re.match(r"--resume(=|$)", each)]):
        del arguments[index : index + (1 if "=" in arguments[index] else 2)]
    if resolved.settings.checkpoint.resume != "auto":
        arguments += ["--resume", "auto"]
    commands = dataclasses.replace(_commands(), arguments=tuple(arguments), device_count=launch.local_world_size)
    return commands.deepspeed() if launch.launcher == "deepspeed" else commands.torchrun()


def _account_for(error: BaseException, folder: RunFolder, launch: Launch, console: Console, command: str) -> NoReturn:
    """Name the first failing rank and the cause in one block, and leave at once: the other ranks may wait for ever."""
    _ending.acquire()  # until the end: a signal that comes now must not cut the last words short
    code = getattr(error, "exit_code", EXIT_OUT_OF_MEMORY if isinstance(error, MemoryError) else EXIT_FAILED)
    text = _in_words(error)
    if folder.record_error(error):
        from ds_trainer.checkpoint.layout import newest_step

        step = newest_step(folder.checkpoints)
        for line in _last_words(error, text, folder, launch, step, command):
            console.print(line, markup=False)
        # What was refused would be refused again.
        folder.finish(code, text, step=step, command=None if isinstance(error, RefusedError) else command)
    console.show_cursor()  # a progress bar hides it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _leave(code: int) -> NoReturn:
    """End a process whose work is done, without taking torch's threads apart.

    The interpreter's own end does that, and now and then aborts in it (SIGABRT, "terminate called without an active exception";
    seen with torch 2.13 and gloo in 2 of 12 runs): a complete run would end with an error.
    """
    atexit._run_exitfuncs()  # trackers send the last of what they hold there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_words(
    error: BaseException, text: str, folder: RunFolder, launch: Launch, step: int | None, command: str
) -> list[str]:
    """What the terminal says at the end of a start that failed."""
    import socket

    who = f"rank {launch.rank} of {launch.world_size} on {socket.gethostname()}"
    if isinstance(error, RefusedError):
        return [f"ds_trainer: {text}", *([f"({who})"] if launch.node_count > 1 else [])]
    if isinstance(error, Stopped):
        return [f"ds_trainer: {text}. {_onwards(step)} with: {command}"]
    # The rank that speaks when another one vanished is not the one that failed.
    how = "was left alone" if text.startswith(_LEFT_ALONE) else "failed first"
    traces = f"Traceback: {folder.error}"
    if isinstance(error, HangError):
        how, traces = "found that the run hangs", f"Stacks of the ranks: {folder.error.parent}"
    return [
        f"\nds_trainer: {who} {how}:",
        *(f"  {line}" for line in text.splitlines()),
        traces,
        f"Log: {folder.log}",
        f"{_onwards(step)}, when the cause is mended, with",
        f"  {command}",
    ]


def _in_words(error: BaseException) -> str:
    """What happened, for somebody who does not read tracebacks."""
    if isinstance(error, DsTrainerError | Stopped):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {str(error)[:500]}"
    if isinstance(error, RuntimeError) and _LOST_PEER.search(text):
        return f"{_LEFT_ALONE}\n({text.splitlines()[0]})"
    return f"{text}\n({frame.filename}:{frame.lineno}, in {frame.name})"


def _post_mortem() -> None:
    import pdb

    pdb.post_mortem(sys.exc_info()[2])
