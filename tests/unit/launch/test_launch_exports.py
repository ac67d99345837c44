"""Which variables reach the workers through pdsh, and what in .deepspeed_env breaks the launcher or a shell."""

from __future__ import annotations

import subprocess

import pytest

from ds_trainer.launch.exports import parse, read_exports, that_matter

SHELL = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/work", "HF_HOME": "/hf", "WANDB_API_KEY": "s", "PATH": "/bin", "UCX_TLS": "tcp"}


def test_only_some_prefixes_are_sent_along(tmp_path):
    exports = read_exports(SHELL, tmp_path / "home", tmp_path)
    assert exports.variables == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/work", "UCX_TLS": "tcp"}
    assert exports.problems == ()


def test_the_file_here_wins_over_the_one_at_home_and_over_the_shell(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("HF_HOME=/home/hf\nNCCL_DEBUG=WARN\n")
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/work/hf\n")
    variables = read_exports(SHELL, home, tmp_path).variables
    assert variables["HF_HOME"] == "/work/hf"
    assert variables["NCCL_DEBUG"] == "WARN"
    other = read_exports({"DS_ENV_FILE": "other_env"}, home, tmp_path)
    assert other.variables == {}


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("", "blank", "sed -i -E"),
        ("# a comment", "`# a comment`, without `=`", "sed -i -E"),
        ("#A=1", "`#A` is no name of a variable", "sed -i -E"),
        ("export A=1", "`export A` is no name", "sed -i -E"),
        ("A;rm=1", "`A;rm` is no name", "sed -i -E"),
        ("A=$(id)", "A: the value holds '$'", "without these characters"),
        ("A=`id`", "A: the value holds '`'", "without these characters"),
        ('A="x"', "A: the value holds '\"'", "without these characters"),
        ("ACCELERATE_MIXED_PRECISION=no", "accelerate wrote it", "sed -i -E"),
    ],
)
def test_a_line_that_breaks_the_launcher_or_a_shell_is_named(line, what, fix):
    variables, problems = parse(f"GOOD=1\n{line}\nLAST=a b'c=d\n", "env")
    assert variables["GOOD"] == "1"
    assert variables["LAST"] == "a b'c=d"
    ((where, found, advice),) = problems
    assert where == "env:2"
    assert what in found
    assert fix in advice


def test_the_fix_for_several_lines_can_be_run_for_each_of_them(tmp_path):
    path = tmp_path / "env"
    path.write_text("\n\nGOOD=1\n# no\n  GOOD2 = 2\nA;rm=1\nACCELERATE_X=1\nGOOD3=3\n")
    variables, problems = parse(path.read_text(), str(path))
    assert len(problems) == 5
    for *_, fix in problems:
        subprocess.run(["sh", "-c", fix.partition(": ")[2]], check=True, timeout=10)
    assert parse(path.read_text(), str(path)) == (variables, [])
    assert sorted(variables) == ["GOOD", "GOOD2", "GOOD3"]


def test_what_the_shell_expands_and_a_file_that_anybody_may_write_are_named(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("A=1\n")
    (tmp_path / ".deepspeed_env").chmod(0o666)
    problems = read_exports({"PYTHONSTARTUP": "$HOME/x"}, tmp_path, tmp_path).problems
    assert [where for where, *_ in problems] == ["$PYTHONSTARTUP", str(tmp_path / ".deepspeed_env")]
    assert problems[1][2] == f"chmod o-w {tmp_path / '.deepspeed_env'}"


def test_variables_that_matter_are_told_from_the_rest():
    found = that_matter({**SHELL, "GLOO_SOCKET_IFNAME": "eth0", "PYTORCH_CUDA_ALLOC_CONF": "x", "EDITOR": "vi"})
    assert sorted(found) == ["GLOO_SOCKET_IFNAME", "HF_HOME", "PYTORCH_CUDA_ALLOC_CONF", "WANDB_API_KEY"]
    assert found["GLOO_SOCKET_IFNAME"] == "the interface that gloo talks through"
