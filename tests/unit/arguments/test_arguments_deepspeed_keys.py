"""The tables of DeepSpeed's keys, held against the DeepSpeed that is installed, and its own check of nested blocks."""

import ast
import importlib
import os
from pathlib import Path

import pytest

from ds_trainer.arguments.constraints import CONSTRAINTS
from ds_trainer.arguments.deepspeed_keys import (
    _MODEL_KEYS,
    _MODELS,
    AUTO_FROM_MODEL,
    OPTIMIZER_PARAMS,
    REFUSED,
    SCHEDULER_PARAMS,
    SCHEDULES,
    SHARED,
    TOP_LEVEL,
    UNCHECKED_BLOCKS,
    check_keys,
    leftover_autos,
    validate_blocks,
)
from ds_trainer.arguments.sources import Located, read_json

os.environ.setdefault("DS_ACCELERATOR", "cpu")
config = pytest.importorskip("deepspeed.runtime.config")


class Recorder(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, content, asked):
        super().__init__(content)
        self.asked = asked

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __copy__(self):
        return self

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def items(self):
        return [(key, dict.__getitem__(self, key)) for key in self]


def keys_asked_for(monkeypatch):
    """By block ("" for the top level), the keys DeepSpeed looks for when it reads a configuration."""
    monkeypatch.setattr(config.dist, "get_rank", lambda *_: (_ for _ in ()).throw(RuntimeError))
    asked = {"": set(), **{block: set() for block in (*UNCHECKED_BLOCKS, "activation_checkpointing")}}
    content = {block: Recorder({}, asked[block]) for block in asked if block}
    content["optimizer"] = Recorder({"type": "adam"}, asked["optimizer"])
    content["scheduler"] = Recorder({"type": "WarmupLR"}, asked["scheduler"])
    content["train_micro_batch_size_per_gpu"] = 1
    config.DeepSpeedConfig(Recorder(content, asked[""]))
    return asked


def keys_in_the_source():
    """Top-level keys by the source of runtime/config.py: whatever is read from `param_dict`, in any branch."""
    module = ast.parse(Path(config.__file__).read_text())

    def is_top(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "keys":
            node = node.func.value
        return (isinstance(node, ast.Name) and node.id == "param_dict") or (
            isinstance(node, ast.Attribute) and node.attr == "_param_dict"
        )

    keys = []
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("get_scalar_param", "get_dict_param"):
            keys += [node.args[1]] if is_top(node.args[0]) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            keys += [node.args[0]] if is_top(node.func.value) else []
        elif isinstance(node, ast.Subscript):
            keys += [node.slice] if is_top(node.value) else []
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            keys += [node.left] if is_top(node.comparators[0]) else []
    names = {getattr(config, key.id, None) if isinstance(key, ast.Name) else getattr(key, "value", None) for key in keys}
    return {name for name in names if isinstance(name, str)}


def test_every_top_level_key_of_the_installed_deepspeed_is_in_a_table(monkeypatch):
    asked = keys_asked_for(monkeypatch)[""]
    source = keys_in_the_source()
    assert len(asked) > 50, "the recorder sees nothing any more"
    assert len(source) > 25, "the source is written otherwise now"
    found = asked | source
    top_level_refused = {key for key in REFUSED if "." not in key}
    assert sorted(found - TOP_LEVEL.keys() - top_level_refused) == [], "DeepSpeed knows a key that we do not"
    # vocabulary_size is read through get(), the removed keys by the loop over them: all others must be known to it too.
    assert sorted(TOP_LEVEL.keys() - found) == [], "DeepSpeed has forgotten a key that we let through"


def test_every_removed_key_of_the_installed_deepspeed_is_refused():
    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() <= REFUSED.keys()
    assert {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS} <= REFUSED.keys()


@pytest.mark.parametrize("block", [*UNCHECKED_BLOCKS])
def test_blocks_that_deepspeed_does_not_check_hold_the_keys_it_asks_for(block, monkeypatch):
    asked = keys_asked_for(monkeypatch)[block]
    asked |= {"params"} if block in ("optimizer", "scheduler") else set()
    known = UNCHECKED_BLOCKS[block].keys() | {key.partition(".")[2] for key in REFUSED if key.startswith(f"{block}.")}
    assert asked - known == set(), f"DeepSpeed knows keys of `{block}` that we do not"
    assert UNCHECKED_BLOCKS[block].keys() - asked == set(), f"DeepSpeed has forgotten keys of `{block}` that we let through"


def fields(block):
    module, name = _MODELS[block].split(":")
    model = getattr(importlib.import_module(module), name)
    return {each for field, info in model.model_fields.items() for each in (field, info.alias) if each}


def test_what_the_tables_say_of_pydantic_blocks_exists_there():
    zero = fields("zero_optimization")
    for block, keys in _MODEL_KEYS.items():
        assert set(keys) <= fields(block)
    assert {path.partition(".")[2] for path in AUTO_FROM_MODEL} <= zero
    rows = {
        row.at.removeprefix("deepspeed.zero_optimization.").partition(".")[0] for row in CONSTRAINTS if "zero_opt" in row.at
    }
    assert rows - {"deepspeed"} <= zero, "a rule about a key that DeepSpeed no longer has"
    for each in SHARED:
        block, _, name = each.key.partition(".")
        assert block in TOP_LEVEL
        assert "." not in name or name.startswith("params.")


def test_what_the_tables_say_of_schedules_and_optimizers_holds_for_the_installed_ones():
    import inspect

    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
    from deepspeed.runtime import lr_schedules
    from torch.optim import Adagrad

    assert SCHEDULES.keys() == SCHEDULER_PARAMS.keys() - {""}
    for name in SCHEDULES:
        takes = inspect.signature(getattr(lr_schedules, name)).parameters
        ours = {each.key.removeprefix("scheduler.params.") for each in SHARED if each.key.startswith("scheduler.params.")}
        assert set(SCHEDULER_PARAMS[name]) == ours & takes.keys()
    classes = {"adam": (FusedAdam, DeepSpeedCPUAdam), "lamb": (FusedLamb,), "lion": (FusedLion, DeepSpeedCPULion)}
    for name, builders in {**classes, "adagrad": (Adagrad,)}.items():
        for builder in builders:
            assert set(OPTIMIZER_PARAMS[name]) <= inspect.signature(builder).parameters.keys()


@pytest.mark.parametrize("path", REFUSED)
def test_a_refused_key_is_refused_with_its_reason_and_line(path, files):
    content = 1
    for key in reversed(path.split(".")):
        content = {key: content}
    if path.startswith("optimizer"):
        content["optimizer"]["type"] = "AdamW"
    if path.startswith("zero_optimization"):
        content["zero_optimization"]["stage"] = 3
    files.json(content)
    where = files.line(f'"{path.rpartition(".")[2]}": 1', "ds.json")
    assert files.problem() == f"{where}: DeepSpeed key `{path}` is not accepted: {REFUSED[path]}"


def tree_of(files, content):
    files.json(content)
    return read_json("ds.json", [])


BLOCK_PROBLEMS = [
    # content -> key whose line is shown, words
    ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com", "did you mean `overlap_comm`?"),
    ({"zero_optimization": {"stage": 3, "gradient_clipping": 1}}, "gradient_clipping", "it belongs at the top level"),
    ({"zero_optimization": {"loss_scale": 0}}, "loss_scale", "it belongs in the block `fp16`"),
    ({"zero_optimization": {"xyzzy": 0}}, "xyzzy", "`zero_optimization` has no such key"),
    ({"zero_optimization": {"offload_optimizer": {"pin_memry": True}}}, "pin_memry", "did you mean `pin_memory`?"),
    ({"zero_optimization": {"offload_optimizer": {"stage": 3}}}, "stage", "it belongs in the block `zero_optimization`"),
    ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "device", 'device` = "gpu" is not valid: input'),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer", '`zero_optimization.offload_optimizer` = "cpu"'),
    ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "reduce_bucket_size", "= 1.5 is not valid"),
    ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "reduce_bucket_size", '= "5e8" is not valid'),
    ({"zero_optimization": {"reduce_bucket_size": "500"}}, "reduce_bucket_size", '= "500" must be a number'),
    ({"zero_optimization": {"reduce_bucket_size": True}}, "reduce_bucket_size", "= true must be a number"),
    ({"zero_optimization": {"overlap_comm": "no"}}, "overlap_comm", '= "no" must be true or false'),
    ({"zero_optimization": {"overlap_comm": 1}}, "overlap_comm", "= 1 must be true or false"),
    ({"zero_optimization": {"offload_optimizer": {"buffer_count": "4"}}}, "buffer_count", '= "4" must be a number'),
    ({"fp16": {"loss_scale": -1}}, "loss_scale", "`fp16.loss_scale` = -1 is not valid"),
    ({"fp16": {"enabled": True, "check_grad_overflow": True}}, "check_grad_overflow", "it belongs in the block `bf16`"),
    ({"bf16": {"enabld": True}}, "enabld", "did you mean `enabled`?"),
    ({"wandb": {"projct": "x"}}, "projct", "did you mean `project`?"),
    ({"tensorboard": {"job_name": 3}}, "job_name", "`tensorboard.job_name` = 3 is not valid"),
    ({"timers": {"throughput": {"enabld": True}}}, "enabld", "`timers.throughput.enabld`; did you mean `enabled`?"),
    ({"optimizer": {"type": "AdamX"}}, "type", "DeepSpeed knows no optimizer `AdamX`; did you mean `Adam"),
    ({"optimizer": {"type": "xyzzy"}}, "type", "DeepSpeed has adagrad, adam, adamw"),
    ({"optimizer": {"type": "SGD", "params": {"momntum": 1}}}, "momntum", "SGD has no such parameter; did you mean `momen"),
    ({"scheduler": {"type": "WarmupCosin"}}, "type", "knows no scheduler `WarmupCosin`; did you mean `WarmupCosineLR`?"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "warmup_steps", "did you mean `warmup_num_steps`?"),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 1}}}, "warmup_max_lr", "no such parameter"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "key", "words"), BLOCK_PROBLEMS, ids=[f"{row[1]}-{row[2][:24]}" for row in BLOCK_PROBLEMS])
def test_deepspeeds_own_check_tells_what_the_tables_cannot(files, content, key, words):
    tree = tree_of(files, content)
    assert check_keys(tree) == [], "this is the second check's business"
    problems = validate_blocks(tree)
    assert len(problems) == 1, "\n".join(map(str, problems))
    assert problems[0].where == files.line(f'"{key}":', "ds.json")
    assert words in problems[0].what


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 5e8, "reduce_bucket_size": "auto"}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 1}, "offload_param": None}},
        {"fp16": {"enabled": "auto", "loss_scale": 0, "hysteresis": 2}, "bf16": {"enabled": "auto"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
        {
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
            }
        },
        {"scheduler": {"type": "StepLR", "params": {"step_size": 3}}},
        {"wandb": {"enabled": False, "project": "x", "group": None}, "comms_logger": {"enabled": True, "prof_ops": []}},
    ],
)
def test_what_deepspeed_takes_is_let_through(files, content):
    tree = tree_of(files, content)
    assert [*check_keys(tree), *validate_blocks(tree)] == []


def test_deepspeeds_own_check_sees_the_monitors_of_the_run_file(files):
    files.run(monitor=["tensorboard: {enabled: true, outputpath: x}"])
    [problem] = validate_blocks(files.resolve().deepspeed)
    assert (problem.where, "did you mean `output_path`?" in problem.what) == ("run.yaml:12", True)


@pytest.mark.parametrize(
    "path", [each.key for each in SHARED] + ["bf16.enabled", "fp16.enabled", *AUTO_FROM_MODEL, "scheduler.params.warmup_min_lr"]
)
def test_an_auto_that_something_fills_is_accepted(files, path):
    assert leftover_autos(nested(path)) == []


def nested(path):
    node = Located("auto", None)
    for key in reversed(path.split(".")):
        node = Located({key: node}, None)
    return node


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("zero_optimization.overlap_comm", "no setting of the run file says what it should be"),
        ("zero_optimization.stage", "no setting of the run file says what it should be"),
        ("zero_optimization.sub_group_size", "no setting of the run file says what it should be"),
        ("wall_clock_breakdown", "no setting of the run file says what it should be"),
        ("bf16.check_grad_overflow", "no setting of the run file says what it should be"),
        ("optimizer.type", "the run file knows AdamW only"),
        ("scheduler.type", "train.schedule needs no block"),
    ],
)
def test_an_auto_that_nothing_fills_is_refused(path, words):
    [problem] = leftover_autos(nested(path))
    assert problem.what.startswith(f'DeepSpeed key `{path}` = "auto", and ')
    assert words in problem.what
