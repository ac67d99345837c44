"""From the options of `debug` to its story: which settings, where it writes, and what of the run this machine cannot do.

Nothing heavy is imported before the settings are known to be right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ds_trainer.arguments.merge import resolve
from ds_trainer.debug.asked import Asked
from ds_trainer.debug.replay import Crash, read_crash, to_its_folder, write_settings
from ds_trainer.launch.detect import Launch


def begin(
    asked: Asked,
    launch: Launch,
    *,
    config: Path | None,
    deepspeed: Path | None,
    settings: Sequence[str],
    replay: Path | None,
    listen: int | None = None,
) -> None:
    """Tell the story of a debug run.

    Args:
        asked: what is run and what is looked for.
        launch: a world of one.
        config: the run file; None with `replay`.
        deepspeed: a DeepSpeed JSON; replaces that of the run file.
        settings: `section.key=value` texts of the command line.
        replay: the folder of a crashed run.
        listen: the port an IDE is waited for on, once the settings are known to be right.

    Raises:
        DsTrainerError: with a text for the user.
    """
    crash: Crash | None = None
    if replay is not None:
        crash = read_crash(replay.absolute(), asked.step)
        config = write_settings(crash.run)
        chosen = asked.checkpoint and named(asked.checkpoint, crash.run).absolute()
        asked = dataclasses.replace(asked, step=None, world_size=crash.world_size, checkpoint=chosen or crash.checkpoint)
        to_its_folder(crash.run, lambda line: print(f"ds_trainer: {line}", flush=True))
    assert config is not None  # require_consistent
    resolved = resolve(config, deepspeed=deepspeed, overrides=settings)
    run = Path(resolved.settings.checkpoint.folder)
    if asked.checkpoint is not None:
        asked = dataclasses.replace(asked, checkpoint=named(asked.checkpoint, run))
    if listen is not None:
        from ds_trainer.debug.listen import wait_for_ide

        wait_for_ide(listen, lambda line: print(f"ds_trainer: {line}", flush=True))

    from ds_trainer import comm
    from ds_trainer.debug.lower import lowered
    from ds_trainer.debug.story import debug
    from ds_trainer.monitor import logs
    from ds_trainer.monitor.run_folder import RunFolder

    folder = RunFolder(run / "debug", 0)
    folder.create()
    logs.quiet_loggers(folder.log)
    console = logs.terminal()
    changes = lowered(resolved, comm.device_of(launch.local_rank).type)
    for each in changes:
        console.print(str(each), markup=False)
    instead = [setting for each in changes for setting in each.settings]
    resume = str(asked.checkpoint) if asked.checkpoint else "never"
    resolved = resolve(config, deepspeed=deepspeed, overrides=[*settings, *instead], resume=resume)
    lacks_precision = any(setting.startswith("train.precision=") for setting in instead)
    debug(resolved, launch, folder, console, asked, crash=crash, other_precision=lacks_precision)


def named(checkpoint: Path, run: Path) -> Path:
    """The checkpoint's folder, where its bare name in the run folder was said."""
    is_name = len(checkpoint.parts) == 1 and not checkpoint.exists()
    return run / "checkpoints" / checkpoint if is_name else checkpoint
