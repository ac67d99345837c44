"""The words of the command line: subcommands in, exit code out. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
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
    EXIT_REFUSED,
    ArgumentsError,
    DsTrainerError,
    LauncherError,
    RefusedError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ds_trainer.arguments.merge import Resolved
    from ds_trainer.launch.commands import Commands
    from ds_trainer.launch.detect import Launch
    from ds_trainer.monitor.run_folder import RunFolder
    from ds_trainer.monitor.signals import StopRequests
    from ds_trainer.state import TrainState

_BEGUN = time.monotonic()
"""When this process began, but for the interpreter's own start."""

_WAIT_FOR_SPEAKER_SECONDS = 5.0
"""Much longer than the starts of two ranks on one busy machine lie apart."""

DEBUG_PORT = 5678
"""Where `debug --listen` waits for an IDE; the port of debugpy's own examples."""

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


class LauncherChoice(StrEnum):
    """Who may start a run."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"


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

    commands = _commands()
    launch = detect_launch(dict(os.environ), commands=commands)
    check_local_rank_argument(launch, context.obj)
    resolved = _resolve(config, deepspeed, overrides, sets, resume)

    from ds_trainer.endings import run_in_folder

    def story(
        folder: RunFolder, console: Console, requests: StopRequests, on_hang: Callable[[BaseException], NoReturn]
    ) -> tuple[str, int]:
        from ds_trainer.monitor.progress import Progress
        from ds_trainer.train import train

        progress = Progress(console if launch.rank == 0 else None)
        state, stopped = train(resolved, launch, folder, progress, requests, on_hang)
        return end_of_patience(resolved, state) + (
            f"done: {state.step} steps, {state.rows_consumed} rows. Everything is in {folder.path}; as a Hugging Face model:\n"
            f"  ds_trainer export --run {folder.path} --to {folder.path / 'export'}"
        ), stopped

    run_in_folder(resolved, launch, commands, story, begun=_BEGUN)


def end_of_patience(resolved: Resolved, state: TrainState) -> str:
    """A line on why a run ended before its last step, where its evaluations did not get better."""
    evaluate, best = resolved.settings.evaluate, state.best
    if evaluate is None or evaluate.patience is None or best.get("evaluations_since", 0) < evaluate.patience:
        return ""
    return (
        f"ended by evaluate.patience = {evaluate.patience}: {best['metric']} was best at step {best['step']} "
        f"({best['value']:.4f}), {best['evaluations_since']} evaluations since were not better. To train on: "
        "evaluate.patience=null\n"
    )


@app.command()
def debug(
    config: Annotated[Path | None, typer.Option("--config", help="The run file (YAML).", show_default=False)] = None,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimizer steps to run; 3 if nothing is said.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show, decoded, with the trained tokens marked.")] = 2,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", min=1, help="As the run of so many ranks: their batch, their rows, their dropout."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Only the rows of this rank, in one step; exact losses, no update.")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="The data of this step, from 1 as in the log; the weights are --from's.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Begin with this checkpoint (a folder, or step_00000100 of the run) and at its step."),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", help="A run folder: run the step again at which the run failed. Takes the place of --config."),
    ] = None,
    nan_hooks: Annotated[
        bool,
        typer.Option("--nan-hooks/--no-nan-hooks", help="Stop where an output or a gradient is first not finite."),
    ] = True,
    anomaly: Annotated[
        bool, typer.Option("--anomaly", help="Name the forward line whose backward pass makes a NaN; several times slower.")
    ] = False,
    listen: Annotated[
        int | None,
        typer.Option("--listen", min=1, max=65535, help="Wait for an IDE (debugpy) on 127.0.0.1 and this port, or 5678."),
    ] = None,
    pdb: Annotated[bool, typer.Option("--pdb", help="Open the debugger where an exception was raised.")] = False,
) -> None:
    """Run steps of a run in this one process, without a launcher: for breakpoints in any line, or a quick look.

    The engine is the same: real DeepSpeed, the configured ZeRO stage and offload. Nothing is saved. Rows are shown as the model
    sees them, each document with the path and line of its sample.

    What rank 5 of 8 sees at step 312, and with the weights of that step:

      ds_trainer debug --config run.yaml --world-size 8 --rank 5 --step 312

      ds_trainer debug --config run.yaml --from step_00000311 --rank 5

    What a crashed run died of; and a breakpoint in an IDE:

      ds_trainer debug --replay out/my-run

      ds_trainer debug --config run.yaml --listen
    """
    from ds_trainer.debug.asked import Asked, require_consistent

    asked = Asked(
        steps=steps,
        show_rows=rows,
        world_size=world_size,
        rank=rank,
        step=step,
        checkpoint=start,
        nan_hooks=nan_hooks,
        anomaly=anomaly,
    )
    require_consistent(asked, config=config, deepspeed=deepspeed, replay=replay)
    if pdb and listen is not None:
        raise RefusedError("--pdb with --listen: one debugger at a time. Leave one of them out.")
    launch = _single_process()
    from ds_trainer.debug.begin import begin

    settings = [*(overrides or []), *(sets or [])]
    try:
        begin(asked, launch, config=config, deepspeed=deepspeed, settings=settings, replay=replay, listen=listen)
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


@app.command("launch-command")
def launch_command(
    config: Config,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", help="The hosts, one `NAME slots=N` a line; see hostfiles/.", show_default=False),
    ] = None,
    launcher: Annotated[
        LauncherChoice | None,
        typer.Option("--launcher", help="By default deepspeed with a hostfile, else torchrun.", show_default=False),
    ] = None,
) -> None:
    """Print the exact command that starts a run on what is here: a hostfile, a SLURM job, or this machine's devices.

    The command alone goes to standard output, so that a script can take it; what it was chosen from, and the batch that so many
    ranks make, go to standard error. A run file, a hostfile or a batch that would be refused is refused here.
    """
    resolved = _resolve(config, deepspeed, overrides, sets, None)

    from ds_trainer.arguments.engine_config import solve_run_batch
    from ds_trainer.launch.choose import choose_command

    words = ["train", "--config", str(config), *(["--deepspeed", str(deepspeed)] if deepspeed else [])]
    words += [*(overrides or []), *(word for each in sets or [] for word in ("--set", each))]
    choice = choose_command(_commands(words), os.environ, hostfile=hostfile, launcher=launcher.value if launcher else None)
    batch = solve_run_batch(resolved, choice.world_size)
    typer.echo(f"# seen: {choice.seen}\n# batch: {batch}\n# to be typed {choice.where}:", err=True)
    for line in choice.commands:
        typer.echo(line)


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
        typer.Option(
            "--tflops", min=0.001, max=1e6, help="What a GPU achieves, in 10^12 operations a second: for time and price."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0.0, max=1e6, help="Of a GPU for an hour; needs --tflops.")
    ] = None,
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
        str | None, typer.Option("--checkpoint", help="Such as step_00000100, or best; by default the newest complete one.")
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


@app.command()
def doctor(
    hostfile: Annotated[
        Path | None, typer.Option("--hostfile", help="Hosts to examine through ssh; by default this machine alone.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="The run file: its paths, disk and ops are examined too."),
    ] = None,
    overrides: Overrides = None,
    deepspeed: DeepSpeedJson = None,
    sets: Sets = None,
    launcher: Annotated[
        LauncherChoice, typer.Option("--launcher", help="What will start the run on the hosts of a hostfile.")
    ] = LauncherChoice.deepspeed,
    port: Annotated[int, typer.Option("--port", min=1024, max=65535, help="Where the ranks would meet.")] = 29500,
    collectives: Annotated[
        bool, typer.Option("--collectives/--no-collectives", help="Let the ranks of all hosts exchange tensors, and time them.")
    ] = True,
    build: Annotated[bool, typer.Option("--build", help="Build the DeepSpeed ops that the run needs, on every host.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds a host may take to answer.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="For machines, with every fact.")] = False,
) -> None:
    """Examine this machine, or all hosts of a hostfile, before a run: what would stop it there, and how to mend that.

    Ends with 0 when the hosts are fit (warnings allowed), and with 2 when something must be mended first.
    """
    import json

    if config is None and (overrides or sets or deepspeed or build):
        raise RefusedError(
            "doctor examines the settings of a run file, and the ops it needs, with --config alone: "
            "ds_trainer doctor --config run.yaml [section.key=value ...]"
        )

    from ds_trainer.arguments.engine_config import solve_run_batch
    from ds_trainer.doctor import report as page
    from ds_trainer.doctor.examine import Wishes, examine
    from ds_trainer.doctor.judge import judge
    from ds_trainer.launch.hostfile import read_hostfile

    hosts = read_hostfile(hostfile) if hostfile else None
    resolved = _resolve(config, deepspeed, overrides, sets, None) if config else None
    if hosts and resolved:
        solve_run_batch(resolved, sum(host.slots for host in hosts))  # refuses a batch that so many ranks cannot share
    wishes = Wishes(
        hosts=hosts,
        resolved=resolved,
        launcher=launcher.value,
        port=port,
        seconds=timeout,
        collectives=collectives,
        build=build,
    )
    evidence = examine(wishes, dict(os.environ), lambda line: print(line, file=sys.stderr, flush=True))
    findings = judge(evidence)
    typer.echo(json.dumps(page.as_json(evidence, findings), indent=1) if as_json else page.as_text(evidence, findings))
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(EXIT_REFUSED)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code. An error of the user's is printed without a traceback.

    Raises:
        SystemExit: typer's way to end a command; with code 2 when it does not understand the command line.
    """
    argv = _with_port(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if not re.match(r"--local[_-]rank=", word)]
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


def _with_port(words: list[str]) -> list[str]:
    """The command line with a port after `--listen`: typer knows no option whose value may be left out."""
    after = [*words[1:], ""]
    return [
        f"{word}={DEBUG_PORT}" if word == "--listen" and not after[index].isdigit() else word
        for index, word in enumerate(words)
    ]


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


def _commands(arguments: list[str] | None = None) -> Commands:
    from ds_trainer.launch.commands import Commands, visible_devices

    return Commands(arguments=tuple(sys.argv[1:] if arguments is None else arguments), device_count=visible_devices(os.environ))


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


def _post_mortem() -> None:
    import pdb

    pdb.post_mortem(sys.exc_info()[2])
