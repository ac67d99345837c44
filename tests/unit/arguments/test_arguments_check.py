"""`ds_trainer check`: every value with its origin, in under a second, for people and for machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_trainer import check
from ds_trainer.arguments.report import engine_rows, resolved_as_json, setting_rows
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.arguments.sources import read_yaml
from ds_trainer.cli import main as cli_main


def main(arguments):
    """The exit code; typer ends a command that went well with SystemExit."""
    try:
        return cli_main(arguments)
    except SystemExit as end:
        return end.code


def rows(found):
    return {path: (value, origin) for path, value, origin in found}


@pytest.fixture
def resolved(files):
    files.run(
        train=["micro_batch_size: 4", "betas: [0.9, 0.99]"],
        monitor=["wandb: {project: mine}"],
        adapter=["lora: {rank: 4}"],
        deepspeed=["zero_optimization: {overlap_comm: false}"],
    )
    files.json(
        {"train_batch_size": 16, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    )
    return files.resolve("train.seed=3", resume="never")


def test_every_setting_has_its_value_and_its_origin(resolved):
    found = rows(setting_rows(resolved))
    assert all(origin for _, origin in found.values())
    expected = {
        "model.path": ("some/model", "run.yaml:2"),
        "model.attention": ("auto", "default"),
        "data.sources": ([{"path": "a.jsonl", "format": "auto"}], "run.yaml:4"),
        "train.micro_batch_size": (4, "run.yaml:9"),
        "train.global_batch_size": (16, "ds.json:2"),
        "train.betas": ([0.9, 0.99], "run.yaml:10"),
        "train.seed": (3, "--set train.seed"),
        "adapter.lora.rank": (4, "run.yaml:16"),
        "adapter.lora.alpha": (32.0, "default"),
        "monitor.wandb.project": ("mine", "run.yaml:14"),
        "checkpoint.resume": ("never", "--resume"),
        "deepspeed.config": ("ds.json", "--deepspeed"),
    }
    assert {path: found[path] for path in expected} == expected
    for section, field in RunSettings.model_fields.items():
        names = [] if section in ("adapter", "evaluate", "deepspeed") else field.annotation.model_fields
        assert all(any(f"{path}.".startswith(f"{section}.{name}.") for path in found) for name in names), section


def test_every_key_that_deepspeed_is_handed_has_its_origin(resolved):
    settings, engine, batch = check.check_rows(resolved, 2, "cpu")
    found = rows(engine)
    expected = {
        "train_micro_batch_size_per_gpu": (4, batch),
        "gradient_clipping": (1.0, "train.max_grad_norm"),
        "bf16.enabled": (True, "train.precision"),
        "zero_optimization.stage": (2, "ds.json:7"),
        "zero_optimization.overlap_comm": (False, "run.yaml:18"),
        "zero_optimization.reduce_bucket_size": (
            "auto",
            "hidden_size x hidden_size, 4096 x 4096 at least; known when the model is loaded",
        ),
        "wandb.project": ("mine", "monitor.wandb.project"),
        "zero_allow_untested_optimizer": (True, "default"),
    }
    assert {path: found[path] for path in expected} == expected
    assert batch == "16 rows a step = 4 micro_batch_size x 2 gradient_accumulation_steps x 2 ranks"
    assert rows(settings) == rows(setting_rows(resolved))


def test_a_value_that_was_replaced_does_not_claim_the_line_it_was_written_in(files):
    from ds_trainer.arguments.engine_config import build_engine_config, solve_run_batch

    resolved = files.json({"zero_allow_untested_optimizer": False}).resolve()
    engine = build_engine_config(resolved, solve_run_batch(resolved, 1), hidden_size=None, whole_layer=None, device_type="cpu")
    assert rows(engine_rows(resolved, engine))["zero_allow_untested_optimizer"] == (True, "default")


def test_what_the_ranks_compare_holds_every_setting_and_every_deepspeed_key(resolved):
    found = resolved_as_json(resolved)
    assert json.loads(json.dumps(found)) == found
    assert found["train.seed"] == {"value": 3, "origin": "--set train.seed"}
    assert found["deepspeed.zero_optimization.stage"] == {"value": 2, "origin": "ds.json:7"}


def test_the_text_shows_values_as_yaml_writes_them(resolved):
    text = check.as_text(resolved, 2, "cpu")
    assert "  train.micro_batch_size             4  " in text
    assert "false" in text
    assert "False" not in text
    assert "None" not in text
    assert '[{"path": "a.jsonl", "format": "auto"}]' in text
    assert "optimizer: torch_adamw on cpu" in text
    assert "Batch: 16 rows a step = 4 micro_batch_size x 2 gradient_accumulation_steps x 2 ranks" in text.splitlines()


def test_json_is_for_machines_and_holds_the_same(files, capsys):
    files.run(train=["global_batch_size: 64", "micro_batch_size: 4"])
    assert main(["check", "--static", "--json", "--config", "run.yaml", "--world-size", "8", "train.seed=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "data_parallel_size": 8,
        "global_batch_size": 64,
    }
    assert found["settings"]["train.seed"] == {"value": 5, "origin": "--set train.seed"}
    assert found["deepspeed"]["gradient_accumulation_steps"]["value"] == 2
    assert found["optimizer"] in ("torch_adamw", "fused_adam")


def test_schema_is_a_json_schema_with_a_description_for_every_setting(capsys):
    assert main(["check", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data", "train", "checkpoint"}
    for name, section in schema["$defs"].items():
        assert section["description"], name
        for field, content in section["properties"].items():
            assert content.get("description"), f"{name}.{field}"


def test_the_shipped_run_files_are_valid_by_the_schema():
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    schema = RunSettings.model_json_schema()
    validator.check_schema(schema)
    examples = list(Path(__file__).parents[3].joinpath("examples").glob("*.yaml"))
    assert examples
    for example in examples:
        assert list(validator(schema).iter_errors(read_yaml(example, []).plain())) == []


def test_a_refusal_is_one_block_without_a_traceback_and_exit_2(files, capsys):
    files.run(train=["foo: 1", "seed: -1"])
    assert main(["check", "--static", "--config", "run.yaml"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == (
        "ds_trainer: 2 problems in the settings; nothing was started.\n"
        "  run.yaml:9: unknown setting `train.foo`; known there: "
        + ", ".join(RunSettings.model_fields["train"].annotation.model_fields)
        + "\n  run.yaml:10: train.seed = -1 must be at least 0\n"
    )


def test_an_impossible_batch_is_refused_for_the_number_of_ranks_it_is_asked_for(files, capsys):
    files.run(train=["global_batch_size: 65", "micro_batch_size: 4"])
    assert main(["check", "--static", "--config", "run.yaml", "--world-size", "8"]) == 2
    assert "run.yaml:9: train.global_batch_size = 65 is not a multiple of" in capsys.readouterr().err


def test_deepspeeds_own_check_is_part_of_it_unless_static(files, capsys):
    pytest.importorskip("deepspeed")
    files.json({"zero_optimization": {"stage": 2, "overlap_com": True}})
    files.run()
    assert main(["check", "--static", "--config", "run.yaml", "--deepspeed", "ds.json"]) == 0
    assert main(["check", "--config", "run.yaml", "--deepspeed", "ds.json"]) == 2
    assert "ds.json:4: unknown DeepSpeed key `zero_optimization.overlap_com`; did you mean" in capsys.readouterr().err


_PROBE = """
import sys
from ds_trainer.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = sorted({"torch", "deepspeed", "transformers", "datasets", "numpy"} & sys.modules.keys())
print("HEAVY", heavy, "CODE", code, file=sys.stderr)
"""


@pytest.mark.parametrize("extra", [["--json"], ["train.foo=1"]], ids=["accepted", "refused"])
def test_static_answers_before_torch_is_imported_and_well_under_a_second(files, extra):
    files.run()
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", _PROBE, "check", "--static", "--config", "run.yaml", *extra]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=True)
    after = os.times()
    # Processor time, so that a busy machine is no failure.
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert f"HEAVY [] CODE {2 if extra[0] != '--json' else 0}" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 1.0, f"{seconds:.2f} s"
