"""The command line itself: words it knows, and what it says when they are missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, clean_environment, run_command

from ds_trainer import __version__
from ds_trainer.cli import main


def said(capsys, *words: str) -> tuple[int, str]:
    try:
        code = main(list(words))
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    return code, out + err


def test_version(capsys):
    assert said(capsys, "--version") == (0, f"ds_trainer {__version__}\n")


@pytest.mark.parametrize("before", [[], ["--local_rank=0"]])
def test_a_forgotten_subcommand_is_named(capsys, before):
    code, text = said(capsys, *before, "--config", "run.yaml")
    assert code == 2
    assert "a subcommand comes first: ds_trainer train --config run.yaml" in text


def test_every_subcommand_explains_itself(capsys):
    for word in ("train", "debug", "check", "plan", "export"):
        code, text = said(capsys, word, "--help")
        assert code == 0
        assert "--help" in text


def test_a_file_of_the_package_is_no_way_to_start(tmp_path):
    done = run_command([sys.executable, str(ROOT / "ds_trainer" / "train.py"), "--config", "run.yaml"], cwd=tmp_path)
    assert done.code == 2
    assert "torchrun --nproc-per-node 2 -m ds_trainer train" in done.err


def test_check_lists_what_is_not_on_this_machine(capsys, run_file):
    path = run_file(model={"path": "./nowhere"})
    run = yaml.safe_load(path.read_text())
    run["data"]["sources"][0]["path"] = "texts_of_tomorrow.jsonl"
    path.write_text(yaml.safe_dump(run))
    code, text = said(capsys, "check", "--static", "--config", str(path))
    assert code == 0
    assert "Not on this machine" in text
    assert "  model.path: ./nowhere\n" in text
    assert "  data.sources: texts_of_tomorrow.jsonl" in text
    code, text = said(capsys, "check", "--static", "--config", str(path), "adapter.lora.path=owner/adapter")
    assert "  adapter.lora.path: owner/adapter\n" in text, "never on the hub"


def test_the_debugger_opens_after_the_error_was_told_and_the_code_stays(run_file, tmp_path):
    path = run_file(model={"path": "./nowhere"})
    command = [sys.executable, "-m", "ds_trainer", "debug", "--pdb", "--config", str(path)]
    done = subprocess.run(
        command, input="q\n", capture_output=True, text=True, timeout=120, cwd=tmp_path, env=clean_environment(), check=False
    )
    assert done.returncode == 2
    assert "model.path = ./nowhere: no such folder" in done.stderr
    assert "(Pdb)" in done.stdout
