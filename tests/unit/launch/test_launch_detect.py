"""The guard against every environment that a launcher was seen to leave, and against broken ones."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_trainer.errors import LauncherError
from ds_trainer.launch.commands import Commands
from ds_trainer.launch.detect import (
    Launch,
    OneRankError,
    check_local_rank_argument,
    detect_launch,
    prints_refusal,
    single_process,
)

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "launch_environments.json").read_text())

WORDS = {
    "accelerate": "`accelerate launch`",
    "deepspeed --launcher mpich": "`deepspeed --launcher mpich`",
    "deepspeed --launcher openmpi": "`deepspeed --launcher openmpi`",
    "deepspeed --launcher slurm": "`deepspeed --launcher slurm`",
    "deepspeed inside a torchrun worker": "`torchrun` and `deepspeed`, one inside the other",
    "mpirun (Open MPI)": "`mpirun` (Open MPI)",
    "srun": "`srun`",
    "plain python": "plain python, without a launcher",
    "multiprocessing child of plain python": "plain python, without a launcher",
}
"""What the refusal calls each starter of the recorded environments."""

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "5",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}
SRUN_TASK = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
LAUNCHED = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED}


def recorded(*, accepted: bool) -> list[object]:
    return [
        pytest.param(entry, id=f"{number}-{entry['case']}-{entry['rank']}")
        for number, entry in enumerate(RECORDED)
        if entry["accepted"] is accepted
    ]


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(LauncherError) as caught:
        detect_launch(environ)
    return str(caught.value)


@pytest.mark.parametrize("entry", recorded(accepted=True))
def test_recorded_workers_of_both_launchers_are_accepted_under_their_name(entry):
    launch = detect_launch(entry["environment"])
    assert launch.launcher == entry["started_by"]
    assert launch.rank == int(entry["rank"])
    assert launch.node_count == 1


@pytest.mark.parametrize("entry", recorded(accepted=False))
def test_recorded_foreign_processes_are_refused_by_name_and_with_a_command_to_copy(entry):
    text = refusal(entry["environment"])
    assert WORDS[entry["started_by"]] in text.replace("\n ", "")
    assert "\n  torchrun --nproc-per-node 2 -m ds_trainer train --config run.yaml" in text
    assert "\n  ds_trainer debug --config run.yaml" in text


def test_recordings_are_all_there():
    assert len(RECORDED) == 50
    assert {entry["started_by"] for entry in RECORDED} == {*WORDS, *LAUNCHED}


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_launch_says_where_the_process_sits(launcher):
    assert detect_launch(LAUNCHED[launcher]) == Launch(
        launcher=launcher,
        rank=5,
        local_rank=1,
        world_size=8,
        local_world_size=4,
        node_rank=1,
        node_count=2,
        master_addr="node-0",
        master_port=29500,
    )


@pytest.mark.parametrize(("said", "restarts"), [("0", False), ("3", True)])
def test_torchrun_says_whether_it_starts_ranks_again(said, restarts):
    assert detect_launch({**LAUNCHED["torchrun"], "TORCHELASTIC_MAX_RESTARTS": said}).restarts is restarts


@pytest.mark.parametrize("launcher", LAUNCHED)
@pytest.mark.parametrize(
    "surroundings",
    [
        SRUN_TASK,
        {**SRUN_TASK, "PMIX_RANK": "1", "PMI_RANK": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "PET_NNODES": "2"},
        {"RAY_JOB_ID": "01", "RAY_ADDRESS": "10.0.0.1:6379"},
        {"ACCELERATE_LOG_LEVEL": "info"},
        {"ACCELERATE_USE_DEEPSPEED": "", "OMPI_COMM_WORLD_RANK": " "},
    ],
    ids=["srun", "srun with a PMI plugin", "kubernetes", "ray job", "accelerate's log level", "emptied marks"],
)
def test_accepted_launchers_may_run_inside_what_does_not_disturb_them(launcher, surroundings):
    assert detect_launch(LAUNCHED[launcher] | surroundings).launcher == launcher


def test_torchrun_may_carry_a_local_size_that_a_cpu_user_set():
    assert detect_launch(TORCHRUN | {"LOCAL_SIZE": "1"}).local_world_size == 4


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "plain python, without a launcher"),
        ({"MASTER_ADDR": "node-0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, "plain python"),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "PMIX_RANK": "0"}, "plain python"),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "`accelerate launch`"),
        (DEEPSPEED | {"ACCELERATE_USE_DEEPSPEED": "true"}, "`accelerate launch`"),
        (TORCHRUN | DEEPSPEED, "`torchrun` and `deepspeed`, one inside the other"),
        (TORCHRUN | {"OMPI_COMM_WORLD_RANK": "1"}, "`torchrun` or `deepspeed` inside `mpirun` (Open MPI)"),
        ({"OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, "`mpirun` (Open MPI)"),
        (SRUN_TASK | {"OMPI_COMM_WORLD_RANK": "0"}, "`mpirun` (Open MPI)"),
        ({"MV2_COMM_WORLD_RANK": "0"}, "`deepspeed --launcher mvapich`"),
        ({"PMI_RANK": "0", "MPI_LOCALRANKID": "0", "RANK": "0", "WORLD_SIZE": "2"}, "`mpiexec` (MPICH, Intel MPI)"),
        (SRUN_TASK | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, "`mpiexec` (MPICH, Intel MPI)"),
        (SRUN_TASK | {"PMIX_RANK": "1", "PMI_RANK": "1"}, "`srun` or `deepspeed --launcher slurm`"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "an MPI launcher (PMI)"),
        ({"PMIX_RANK": "0"}, "an MPI launcher (PMIx)"),
        ({"RAY_JOB_ID": "01", "RANK": "0", "WORLD_SIZE": "2"}, "inside Ray"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "inside Ray"),
        ({"RAY_RAYLET_PID": "77"}, "inside Ray"),
        ({"PET_NNODES": "2", "RANK": "0", "WORLD_SIZE": "2"}, "a Kubernetes operator without torchrun"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "0"}, "a Kubernetes operator, which set RANK or WORLD_SIZE"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "plain python"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no known launcher"),
    ],
)
def test_each_foreign_start_is_refused_in_its_own_words(environ, words):
    assert words in refusal(environ).partition("\nFound:")[0].replace("\n ", "")


def test_accelerate_refusal_points_to_a_stale_deepspeed_env():
    assert ".deepspeed_env" in refusal({"ACCELERATE_USE_DEEPSPEED": "true"})


def test_srun_refusal_shows_srun_starting_one_torchrun_a_node():
    text = refusal(SRUN_TASK)
    assert '--ntasks-per-node=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --rdzv-backend c10d' in text


def test_pods_that_are_numbered_get_a_torchrun_that_uses_their_numbers():
    text = refusal({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "0", "WORLD_SIZE": "2"})
    assert 'torchrun --nnodes "$WORLD_SIZE" --node-rank "$RANK"' in text


@pytest.mark.parametrize(
    ("launcher", "changed", "words"),
    [
        ("torchrun", {"RANK": "8", "ROLE_RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ("torchrun", {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
        ("torchrun", {"GROUP_RANK": "2"}, "GROUP_RANK=2 is not below GROUP_WORLD_SIZE=2"),
        ("torchrun", {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9 is above WORLD_SIZE=8"),
        ("torchrun", {"ROLE_RANK": "0"}, "ROLE_RANK=0 is not RANK=5"),
        ("torchrun", {"WORLD_SIZE": "16"}, "ROLE_WORLD_SIZE=8 is not WORLD_SIZE=16"),
        ("torchrun", {"RANK": ""}, "RANK missing"),
        ("torchrun", {"MASTER_ADDR": " "}, "MASTER_ADDR missing"),
        ("deepspeed", {"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ("deepspeed", {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_SIZE=4"),
        ("deepspeed", {"RANK": "0"}, "LOCAL_RANK=1 is above RANK=0"),
        ("deepspeed", {"CROSS_RANK": "2"}, "CROSS_RANK=2 is not below CROSS_SIZE=2"),
        ("deepspeed", {"CROSS_SIZE": ""}, "CROSS_SIZE missing"),
        ("deepspeed", {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not a whole number"),
        ("deepspeed", {"WORLD_SIZE": "8.0"}, "WORLD_SIZE=8.0 is not a whole number"),
        ("deepspeed", {"RANK": "\u0665"}, "is not a whole number"),
        ("deepspeed", {"RANK": "1" * 5000}, "is not a whole number"),
        ("deepspeed", {"MASTER_PORT": "0"}, "MASTER_PORT=0 is not between 1 and 65535"),
        ("deepspeed", {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not between 1 and 65535"),
    ],
)
def test_contradictory_variables_of_an_accepted_launcher_are_named(launcher, changed, words):
    with pytest.raises(OneRankError, match=launcher) as caught:
        detect_launch(LAUNCHED[launcher] | changed)
    assert words in str(caught.value)


def test_leftover_rank_variables_are_named_with_the_line_that_unsets_them():
    text = refusal({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "RANK": ""})
    assert "RANK, MASTER_ADDR, MASTER_PORT missing" in text
    assert "\n  unset LOCAL_RANK WORLD_SIZE\n" in text


def test_refusal_shows_few_short_printable_values_and_no_secret():
    text = refusal(
        {
            "ACCELERATE_MIXED_PRECISION": "no\x1b[31m\n" + "x" * 500,
            "ACCELERATE_API_TOKEN": "hf_abc",
            "HF_TOKEN": "hf_abc",
            **{f"ACCELERATE_Z{number}": "1" for number in range(20)},
        }
    )
    found = text.partition("Found: ")[2].partition("ds_trainer trains")[0]
    assert found.count("=") == 8
    assert "hf_abc" not in text
    assert "\x1b" not in text
    assert "x" * 50 not in text


@pytest.mark.parametrize("entry", recorded(accepted=False))
def test_prose_of_a_refusal_fits_a_terminal(entry):
    prose = refusal(entry["environment"]).partition("\nStart it")[0].splitlines()
    assert max(len(line) for line in prose if not line.startswith("  unset ")) <= 110


def test_refusal_repeats_the_users_arguments_and_device_count():
    commands = Commands(arguments=("train", "--config", "my run.yaml", "train.max_steps=5"), device_count=8)
    with pytest.raises(LauncherError) as caught:
        detect_launch({}, commands=commands)
    assert "torchrun --nproc-per-node 8 -m ds_trainer train --config 'my run.yaml' train.max_steps=5" in str(caught.value)


MARKS = sorted({name for entry in RECORDED for name in entry["environment"]} | {"PET_NNODES", "RAY_JOB_ID", "PMI_ID"})
GARBAGE = ["", " ", "-1", "0", "1", "2", "99999999999", "1e3", "nan", "\u0663", "\u00b2", "\udcff", "a b", "{x}", "x" * 999]


@settings(deadline=None, database=None)
@given(
    entry=st.sampled_from(RECORDED),
    changed=st.dictionaries(st.sampled_from(MARKS), st.sampled_from(GARBAGE), max_size=6),
    removed=st.sets(st.sampled_from(MARKS), max_size=4),
)
def test_garbage_in_the_environment_raises_nothing_but_launcher_errors(entry, changed, removed):
    environ = {name: value for name, value in (entry["environment"] | changed).items() if name not in removed}
    with contextlib.suppress(LauncherError):
        launch = detect_launch(environ)
        assert 0 <= launch.rank < launch.world_size
        assert 0 <= launch.local_rank < launch.local_world_size <= launch.world_size
        assert 0 <= launch.node_rank < launch.node_count
    with contextlib.suppress(LauncherError):
        assert single_process(environ, port=29500).launch.world_size == 1
    assert prints_refusal(LauncherError(), environ) in (True, False)


@pytest.mark.parametrize("value", [None, 1])
def test_local_rank_argument_that_agrees_or_is_absent_passes(value):
    check_local_rank_argument(detect_launch(DEEPSPEED), value)


def test_local_rank_argument_that_contradicts_the_environment_is_refused():
    with pytest.raises(OneRankError, match=r"--local_rank=0 .* LOCAL_RANK=1 on rank 5"):
        check_local_rank_argument(detect_launch(DEEPSPEED), 0)


def test_debug_in_a_clean_shell_sets_the_five_variables_and_removes_nothing():
    environ = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
    single = single_process(environ, port=4242)
    assert single.remove == ()
    assert single.assign == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4242",
    }
    assert (single.launch.launcher, single.launch.world_size, single.launch.master_port) == ("debug", 1, 4242)


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "", "GROUP_RANK": "1"},
        {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "ROLE_RANK": "0", "PET_NNODES": "1"},
        {"CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "1", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMIX_RANK": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
        {"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "1"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true"},
    ],
    ids=["stale", "torchrun", "deepspeed", "openmpi", "mpich", "mvapich", "accelerate"],
)
def test_debug_removes_what_a_launcher_of_one_process_left(environ):
    single = single_process(environ | {"PATH": "/bin", "OMPI_MCA_btl": "tcp", "ACCELERATE_LOG_LEVEL": "info"}, port=1)
    assert set(single.remove) == set(environ) - set(single.assign)


def test_debug_is_accepted_as_the_only_task_of_an_srun_step():
    environ = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    assert single_process(environ, port=1).remove == ()
    assert single_process(environ | {"SLURM_STEP_ID": "0"}, port=1).remove == ()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (TORCHRUN, "`torchrun` with 8"),
        (DEEPSPEED, "`deepspeed` with 8"),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}, "`accelerate launch` with 8"),
        (TORCHRUN | DEEPSPEED, "one inside the other with 8"),
        (SRUN_TASK, "slurm` with 2"),
        (SRUN_TASK | TORCHRUN | {"WORLD_SIZE": "1"}, "slurm` with 2"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "openmpi` with 4"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "(PMI) with 4"),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"}, "mvapich` with 4"),
    ],
)
def test_debug_as_one_of_several_processes_is_refused_with_the_way_out(environ, words):
    with pytest.raises(LauncherError) as caught:
        single_process(environ, port=1)
    assert words in str(caught.value).replace("\n ", "")
    assert "Start it without a launcher:\n  ds_trainer debug --config run.yaml" in str(caught.value)
    unset = str(caught.value).partition("\n  unset ")[2].partition("\n")[0].split()
    single_process({name: value for name, value in environ.items() if name not in unset}, port=1)


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_RANK": "{}"},
        {"MV2_COMM_WORLD_RANK": "{}"},
        {"PMI_RANK": "{}"},
        {"PMIX_RANK": "{}"},
        SRUN_TASK | {"SLURM_PROCID": "{}"},
        TORCHRUN | DEEPSPEED | {"RANK": "{}"},
        TORCHRUN | {"RANK": "{}", "ACCELERATE_MIXED_PRECISION": "no"},
        {"RANK": "1", "OMPI_COMM_WORLD_RANK": "{}"},
    ],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_refusal_that_all_ranks_meet_is_printed_by_rank_zero_alone(environ, rank):
    environ = {name: value.format(rank) for name, value in environ.items()}
    with pytest.raises(LauncherError) as caught:
        detect_launch(environ)
    assert prints_refusal(caught.value, environ) is (rank == 0)


@pytest.mark.parametrize(
    "environ",
    [{}, {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {"PMI_RANK": "x"}],
)
def test_refusal_is_printed_where_no_launcher_vouches_for_another_rank_that_would(environ):
    with pytest.raises(LauncherError) as caught:
        detect_launch(environ)
    assert prints_refusal(caught.value, environ)


def test_contradiction_on_one_rank_is_printed_by_that_rank():
    environ = TORCHRUN | {"LOCAL_RANK": "4"}
    with pytest.raises(LauncherError) as caught:
        detect_launch(environ)
    assert prints_refusal(caught.value, environ)


def test_guard_imports_nothing_heavy():
    script = """
import sys
import ds_trainer.launch.detect
print(sorted({"torch", "deepspeed", "pydantic", "yaml", "typer", "rich", "socket"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
