"""Run many commands of ds_trainer in one go: the imports are paid for once, then each rank of a command is a fork.

    python forks.py COMMANDS.json RESULTS.json    # all, one after the other
    python forks.py FOLDER                        # a line of standard input is a command, a line of standard output its result

A command is {"arguments": [...], "ranks": 2, "environment": {...}}; its result is what the terminal showed and the exit
codes of its ranks. With more than one rank, they find torchrun's variables, and share a terminal as under torchrun.
With "script" the arguments are those of that Python file; "folder" is where it is run. With "kill", some ranks get a SIGKILL:
{"ranks": [0], "when": "saved", "after": 0.5} is half a second after the terminal showed that word.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TextIO

from ds_trainer import faults

SECONDS = 60.0
PATIENCE = 2.0
"""Seconds between the end of the first rank that failed and the SIGTERM for the others; torchrun takes 0.1."""


def torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    one_node = dict.fromkeys(("GROUP_RANK",), "0") | dict.fromkeys(("GROUP_WORLD_SIZE",), "1")
    places = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(ranks))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    return one_node | places | sizes | meeting


def start(arguments: list[str], environment: dict[str, str], terminal: Path, script: str = "", folder: str = "") -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        os.chdir(folder or ".")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target in (1, 2):
            os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
        sys.argv = [script or "ds_trainer", *arguments]
        if faults.VARIABLE in os.environ:  # read when it was imported, before this command
            faults._faults = faults.ours(os.environ)
        if script:
            runpy.run_path(script, run_name="__main__")
            code = 0
        else:
            from ds_trainer.cli import main

            code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(command: dict, terminal: Path) -> dict:
    ranks = command.get("ranks", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    running = {}
    for rank in range(ranks):
        variables = torchrun_variables(rank, ranks, port) if ranks > 1 or command["arguments"][0] == "train" else {}
        variables |= command.get("environment", {})
        where = command.get("script", ""), command.get("folder", "")
        running[start(command["arguments"], variables, terminal, *where)] = rank
    codes: dict[int, int] = {}
    failed = 0.0
    kill = command.get("kill")
    seen = 0.0
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            code = codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            failed = failed or (time.monotonic() if code else 0.0)
            continue
        time.sleep(0.01)
        if kill and not seen and terminal.exists() and kill["when"] in terminal.read_text(errors="replace"):
            seen = time.monotonic()
        if kill and seen and time.monotonic() - seen >= kill["after"]:
            for child in [child for child, rank in running.items() if rank in kill["ranks"]]:
                os.kill(child, signal.SIGKILL)
            kill = None
        late, spent = failed and time.monotonic() - failed > PATIENCE, time.monotonic() - started
        for child in running if late or spent > SECONDS else ():
            os.kill(child, signal.SIGKILL if spent > SECONDS else signal.SIGTERM)
    return {
        "text": terminal.read_text(errors="replace"),
        "codes": [codes[rank] for rank in range(ranks)],
        "seconds": time.monotonic() - started,
    }


def serve(folder: Path, replies: TextIO) -> None:
    for number, line in enumerate(sys.stdin):
        print(json.dumps(run(json.loads(line), folder / f"terminal_{number}.txt")), file=replies, flush=True)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")  # what the imports print goes elsewhere
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import ds_trainer.debug.story
    import ds_trainer.export
    import ds_trainer.train  # noqa: F401

    if len(sys.argv) == 2:
        serve(Path(sys.argv[1]), replies)
        sys.exit()
    commands, results = Path(sys.argv[1]), Path(sys.argv[2])
    done = {name: run(each, results.parent / f"terminal_{name}.txt") for name, each in json.loads(commands.read_text()).items()}
    results.write_text(json.dumps(done))
