"""One value a setting: who wins, who contradicts whom, and what a wrong key or type is told."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_trainer import check
from ds_trainer.arguments.constraints import CONSTRAINTS
from ds_trainer.arguments.deepspeed_keys import SHARED, TOP_LEVEL, UNCHECKED_BLOCKS
from ds_trainer.arguments.explain import ALIASES
from ds_trainer.arguments.merge import resolve
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.errors import ArgumentsError


def value(resolved, path):
    node = resolved.settings
    for part in path.split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def nest(path, leaf):
    for key in reversed(path.split(".")):
        leaf = {key: leaf}
    return leaf


def test_the_order_is_defaults_then_json_then_run_file_then_command_line(files):
    assert str(files.resolve().origin("train.max_grad_norm")) == "default"
    files.json({"gradient_clipping": 0.5})
    resolved = files.resolve()
    assert (value(resolved, "train.max_grad_norm"), str(resolved.origin("train.max_grad_norm"))) == (0.5, "ds.json:2")
    files.run(train=["max_grad_norm: 0.7"]).json({"gradient_clipping": "auto"})
    resolved = files.resolve()
    assert (value(resolved, "train.max_grad_norm"), str(resolved.origin("train.max_grad_norm"))) == (0.7, "run.yaml:9")
    resolved = files.resolve("train.max_grad_norm=0.9")
    origin = str(resolved.origin("train.max_grad_norm"))
    assert (value(resolved, "train.max_grad_norm"), origin) == (0.9, "--set train.max_grad_norm")


PAIRS = {
    "train.micro_batch_size": (4, 8),
    "train.gradient_accumulation_steps": (4, 8),
    "train.global_batch_size": (4, 8),
    "train.max_grad_norm": (0.5, 2.0),
    "train.learning_rate": (1e-3, 2e-3),
    "train.betas": ([0.9, 0.99], [0.8, 0.99]),
    "train.eps": (1e-6, 1e-7),
    "train.weight_decay": (0.1, 0.2),
    "train.warmup_steps": (5, 6),
    "train.max_steps": (50, 60),
    "monitor.log_every_steps": (5, 6),
    "monitor.tensorboard": ({"job_name": "a"}, {"job_name": "b"}),
    "monitor.wandb": ({"project": "a"}, {"project": "b"}),
    "monitor.csv_monitor": ({"job_name": "a"}, {"job_name": "b"}),
    "monitor.comet": ({"project": "a"}, {"project": "b"}),
}
PAIR_KEYS = [pytest.param(each, id=each.key) for each in SHARED]


def with_pair(files, pair, ours, theirs):
    """A run file that says `ours` and a JSON that says `theirs` of one setting; None is left out."""
    section, _, name = pair.setting.partition(".")
    lines = {} if ours is None else {section: [f"{name}: {json.dumps(ours)}"]}
    content = {}
    if pair.key.startswith("optimizer."):
        content["optimizer"] = {"type": "AdamW", "params": {}}
    if pair.key.startswith("scheduler."):
        content["scheduler"] = {"type": "WarmupDecayLR", "params": {}}
    if pair.setting == "train.max_steps" and ours is not None:
        files.run("\n".join(yaml_lines(max_steps=ours)))
    elif pair.setting == "train.max_steps":
        files.run("\n".join(yaml_lines()))
    else:
        files.run(**lines)
    *blocks, last = pair.key.split(".")
    inner = content
    for block in blocks:
        inner = inner.setdefault(block, {})
    if theirs is not None:
        inner[last] = theirs
    files.json(content)


def yaml_lines(**train):
    lines = ["model: {path: some/model}", "data: {sources: [{path: a.jsonl}], seq_len: 128}", "checkpoint: {folder: out/x}"]
    return [*lines, "train:", "  stage: sft", *(f"  {name}: {value}" for name, value in train.items())]


def test_every_shared_setting_has_an_example_here():
    assert {each.setting for each in SHARED} == PAIRS.keys()


@pytest.mark.parametrize("pair", PAIR_KEYS)
def test_one_setting_in_two_languages_agrees_fills_in_or_conflicts(files, pair):
    first, second = PAIRS[pair.setting]
    with_pair(files, pair, first, first)
    assert value(files.resolve(), pair.setting) == first

    with_pair(files, pair, first, "auto")
    assert value(files.resolve(), pair.setting) == first

    with_pair(files, pair, None, first)
    resolved = files.resolve(
        *(["train.max_steps=9"] if pair.key.startswith("scheduler") and "max_steps" not in pair.setting else [])
    )
    assert value(resolved, pair.setting) == first, "what only the JSON says holds"

    with_pair(files, pair, first, second)
    leaf = next(iter(first), "") if isinstance(first, dict) else ""
    setting, key = (f"{pair.setting}.{leaf}", f"{pair.key}.{leaf}") if leaf else (pair.setting, pair.key)
    a, b = (first[leaf], second[leaf]) if leaf else (first, second)
    name = pair.setting.rpartition(".")[2]
    json_line = files.line(f'"{key.rpartition(".")[2]}":', "ds.json")
    assert files.problem() == (
        f"{files.line(f'  {name}:')}: {setting} = {json.dumps(a)} contradicts "
        f"DeepSpeed's `{key}` = {json.dumps(b)} ({json_line}): "
        'they are one setting. Remove one of them, or write "auto" for DeepSpeed\'s.'
    )
    assert value(files.resolve(f"{setting}={json.dumps(b)}"), setting) == b, "the command line agrees with the JSON"
    third = "c" if isinstance(b, str) else [0.5, 0.5] if isinstance(b, list) else 7
    assert value(files.resolve(f"{setting}={json.dumps(third)}"), setting) == third, "only the command line may overrule"
    assert value(files.resolve(f"deepspeed.{key}={json.dumps(third)}"), setting) == third, "in either language"


def test_the_run_files_deepspeed_section_lies_on_top_of_the_json(files):
    files.run(deepspeed=["zero_optimization: {overlap_comm: false, stage: 3}", "wall_clock_breakdown: true"])
    files.json({"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_scatter": True}})
    tree = files.resolve().deepspeed
    found = {path: (node.value, str(node.origin)) for path, node in tree.leaves()}
    assert found == {
        "zero_optimization.stage": (3, "run.yaml:12"),
        "zero_optimization.overlap_comm": (False, "run.yaml:12"),
        "zero_optimization.reduce_scatter": (True, "ds.json:5"),
        "wall_clock_breakdown": (True, "run.yaml:13"),
    }


def test_two_parts_of_a_shared_block_are_not_a_conflict(files):
    files.run(monitor=["wandb: {project: mine}"]).json({"wandb": {"enabled": True, "group": "auto"}})
    problem = files.problem()
    assert problem.startswith('ds.json:4: DeepSpeed key `wandb.group` = "auto", and no setting of the run file says')
    files.json({"wandb": {"enabled": True}})
    resolved = files.resolve()
    assert resolved.settings.monitor.wandb == {"project": "mine", "enabled": True}
    assert (str(resolved.origin("monitor.wandb.project")), str(resolved.origin("monitor.wandb.enabled"))) == (
        "run.yaml:12",
        "ds.json:3",
    )
    assert resolved.deepspeed.find("wandb.project").value == "mine", "DeepSpeed's own check sees the run file's part too"


PRECISION = [
    # (bf16.enabled, fp16.enabled, train.precision) -> the precision in force, or the key that contradicts
    ((True, None, None), "bf16"),
    ((None, True, None), "fp16"),
    ((False, None, None), "fp32"),
    ((False, True, None), "fp16"),
    ((True, False, None), "bf16"),
    ((False, False, None), "fp32"),
    ((None, False, None), "bf16"),
    (("auto", "auto", "fp16"), "fp16"),
    (("auto", None, None), "bf16"),
    ((False, None, "fp32"), "fp32"),
    ((False, None, "fp16"), "fp16"),
    ((False, "auto", "fp16"), "fp16"),
    ((True, False, "bf16"), "bf16"),
    ((False, None, "bf16"), "`bf16.enabled` = false"),
    ((None, False, "fp16"), "`fp16.enabled` = false"),
    ((True, None, "fp16"), "`bf16.enabled` = true"),
    ((True, None, "fp32"), "`bf16.enabled` = true"),
    ((None, True, "fp32"), "`fp16.enabled` = true"),
]


@pytest.mark.parametrize(("said", "outcome"), PRECISION)
def test_precision_is_one_setting_said_in_two_blocks(files, said, outcome):
    bf16, fp16, ours = said
    files.run(train=[f"precision: {ours}"] if ours else [])
    files.json({name: {"enabled": on} for name, on in (("bf16", bf16), ("fp16", fp16)) if on is not None})
    if outcome.startswith("`"):
        problem = files.problem()
        assert problem.startswith(f'run.yaml:9: train.precision = "{ours}" contradicts DeepSpeed\'s {outcome} (ds.json:3)')
        for precision in ("bf16", "fp16", "fp32"):
            assert files.resolve(f"train.precision={precision}").settings.train.precision == precision
    else:
        assert files.resolve().settings.train.precision == outcome


def test_the_old_name_of_bf16_is_not_silently_ignored(files):
    assert "rename the block" in files.json({"bfloat16": {"enabled": True}}).problem()


@pytest.mark.parametrize("word", ["yes", 1, "true"])
def test_precision_blocks_take_true_or_false_only(files, word):
    assert "`bf16.enabled`" in files.json({"bf16": {"enabled": word}}).problem()


@pytest.mark.parametrize(
    ("kind", "schedule"), [("WarmupLR", "constant"), ("WarmupDecayLR", "linear"), ("WarmupCosineLR", "cosine")]
)
def test_deepspeeds_schedules_have_names_in_the_run_file(files, kind, schedule):
    files.json({"scheduler": {"type": kind}})
    assert files.resolve().settings.train.schedule == schedule
    files.run(train=[f"schedule: {schedule}"])
    assert files.resolve().settings.train.schedule == schedule
    other = "linear" if schedule != "linear" else "cosine"
    files.run(train=[f"schedule: {other}"])
    assert files.problem() == (
        f'run.yaml:9: train.schedule = "{other}" contradicts DeepSpeed\'s `scheduler.type` = "{kind}" (ds.json:3): '
        "they are one setting. Remove one of them."
    )


def test_a_schedule_of_the_command_line_puts_deepspeeds_aside(files):
    files.json({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 7}}})
    resolved = files.resolve("train.schedule=linear")
    assert resolved.deepspeed.find("scheduler") is None
    assert (resolved.settings.train.schedule, resolved.settings.train.warmup_steps) == ("linear", 7)
    assert files.resolve("train.schedule=cosine").deepspeed.find("scheduler") is not None
    files.json({"scheduler": {"type": "OneCycle"}})
    assert files.resolve("train.schedule=linear").deepspeed.find("scheduler") is None


def test_a_learning_rate_said_twice_in_the_json_is_one_setting_too(files):
    files.json(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}},
        }
    )
    problem = files.problem()
    assert (
        "DeepSpeed `optimizer.params.lr` = 0.0001 contradicts DeepSpeed's `scheduler.params.warmup_max_lr` = 0.001" in problem
    )
    assert files.resolve("train.learning_rate=5e-4").settings.train.learning_rate == 5e-4


def test_null_says_nothing_and_takes_back_what_the_files_say(files):
    files.run(train=["micro_batch_size: null", "epochs: ~"]).json({"train_micro_batch_size_per_gpu": 4})
    assert files.resolve().settings.train.micro_batch_size == 4
    assert files.resolve("train.max_steps=null", "train.epochs=2").settings.train.max_steps is None


RUN_FILE_PROBLEMS = [
    # section, line -> words of the message at that line
    ("train", 'micro_batch_size: "8"', 'train.micro_batch_size = "8" is text; write 8 without quotes'),
    ("train", "micro_batch_size: 1.5", "train.micro_batch_size = 1.5 is not a whole number"),
    ("train", "micro_batch_size: 8.0", "train.micro_batch_size = 8.0 is not a whole number; write 8"),
    ("train", "micro_batch_size: 1e2", "train.micro_batch_size = 100.0 is not a whole number; write 100"),
    ("train", "micro_batch_size: true", "train.micro_batch_size = true is not a whole number"),
    ("train", "micro_batch_size: yes", 'train.micro_batch_size = "yes" is not a whole number'),
    ("train", "micro_batch_size: 12:30", 'train.micro_batch_size = "12:30" is not a whole number'),
    ("train", "micro_batch_size: 0", "train.micro_batch_size = 0 must be at least 1"),
    ("train", "micro_batch_size: -4", "train.micro_batch_size = -4 must be at least 1"),
    ("train", "micro_batch_size: [4]", "train.micro_batch_size = [4] is not a whole number"),
    ("train", "micro_batch_size: {a: 4}", 'train.micro_batch_size = {"a": 4} is not a whole number'),
    ("train", 'learning_rate: "1e-5"', 'train.learning_rate = "1e-5" is text; write 1e-5 without quotes'),
    ("train", "learning_rate: nan", 'train.learning_rate = "nan" is not a number'),
    ("train", "learning_rate: 0", "train.learning_rate = 0 must be greater than 0"),
    ("train", "learning_rate: 1,5", 'train.learning_rate = "1,5" is not a number'),
    ("train", "learning_rate: null", "train.learning_rate = null, but it needs a value"),
    ("train", "betas: 0.9", "train.betas = 0.9 must be a list in brackets; write for example `betas: [0.9, 0.95]`"),
    ("train", "betas: [0.9]", "train.betas = [0.9] is too short"),
    ("train", "betas: []", "train.betas = [] must not be empty"),
    ("train", "betas: [0.9, 0.9, 0.9]", "train.betas = [0.9, 0.9, 0.9] is too long"),
    ("train", "betas: [0.9, 1.0]", "train.betas.1 = 1.0 must be less than 1"),
    ("train", "schedule: cosin", "must be one of 'constant', 'linear', 'cosine'; did you mean `cosine`?"),
    ("train", "precision: bfloat16", "must be one of 'bf16', 'fp16', 'fp32'"),
    ("data", "packing: yes", 'data.packing = "yes" must be true or false: write true, without quotes'),
    ("data", 'packing: "false"', "write false, without quotes"),
    ("data", "packing: 1", "data.packing = 1 must be true or false"),
    ("model", "revision: 12", 'model.revision = 12 must be text; put it in quotes: "12"'),
    ("model", "revision: [a]", 'model.revision = ["a"] must be text'),
    ("model", 'revision: ""', 'model.revision = "" must not be empty'),
    ("model", "config: 3", "model.config = 3 does not fit; write the path of a config.json, or a block with `model_type"),
    ("model", "quantize: int8", """model.quantize = "int8" can only be 'nf4'; with 8 bits, bitsandbytes computes one thing"""),
    ("adapter", "lora: {target_modules: all-linera}", 'target_modules = "all-linera" does not fit; write `all-linear` or'),
    ("adapter", "lora: {target_modules: [1]}", "target_modules = [1] does not fit"),
    ("adapter", "lora: 3", "adapter.lora = 3 must be a block of settings; write for example `lora: {rank: 16}`"),
    ("monitor", "wandb: true", "monitor.wandb = true must be a block of settings; write for example `wandb: {enabled: true"),
    ("train", "learning_rte: 1", "unknown setting `train.learning_rte`; did you mean `train.learning_rate`?"),
    ("train", "seq_len: 5", "unknown setting `train.seq_len`; it belongs in another place: `data.seq_len`"),
    ("train", "rank: 5", "it belongs in another place: `adapter.lora.rank`"),
    ("train", "train_batch_size: 8", "unknown setting `train.train_batch_size`; here it is called `train.global_batch_size`"),
    ("train", "gradient_clipping: 1.0", "here it is called `train.max_grad_norm`"),
    ("train", "zero_optimization: {stage: 2}", "a key of DeepSpeed's: write it in the section `deepspeed`, as `deepspeed.zero"),
    ("train", "elasticity: {}", "it is a key of DeepSpeed's"),
    ("train", "xyzzy: 1", "unknown setting `train.xyzzy`; known there: stage, max_steps, epochs"),
    ("trian", "stage: sft", "unknown setting `trian`; did you mean `train`?"),
    ("deepspeed", "stage: 3", "unknown DeepSpeed key `stage`, which DeepSpeed would ignore; it belongs in the block `zero_opt"),
    ("deepspeed", "config: 3", 'deepspeed.config = 3 must be text; put it in quotes: "3"'),
]  # fmt: skip


@pytest.mark.parametrize(("section", "line", "words"), RUN_FILE_PROBLEMS, ids=[row[1] for row in RUN_FILE_PROBLEMS])
def test_what_is_wrong_in_the_run_file_is_named_with_its_line_and_a_remedy(files, section, line, words):
    files.run(**{section: [line]})
    where = files.line(f"  {line}") if section != "trian" else files.line("trian:")
    problem = files.problem()
    assert problem.startswith(f"{where}: ")
    assert words in problem


@pytest.mark.parametrize("alias", ALIASES)
def test_other_trainers_names_are_translated(files, alias):
    files.run(train=[f"{alias}: 1"])
    assert files.problem() == f"run.yaml:9: unknown setting `train.{alias}`; here it is called `{ALIASES[alias]}`"


def test_every_translation_names_a_setting_that_exists(files):
    from ds_trainer.arguments.explain import _fields

    assert {name.partition(":")[0] for name in ALIASES.values()} <= _fields(RunSettings).keys()


JSON_PROBLEMS = [
    ({"train_batch_sise": 3}, "unknown DeepSpeed key `train_batch_sise`, which DeepSpeed would ignore; did you mean `train_b"),
    ({"gradient_accumulation_step": 3}, "did you mean `gradient_accumulation_steps`?"),
    ({"zero_optimisation": {"stage": 3}}, "did you mean `zero_optimization`?"),
    ({"zero_allow_untested_optimizers": True}, "did you mean `zero_allow_untested_optimizer`?"),
    ({"stage": 3}, "it belongs in the block `zero_optimization`"),
    ({"stage3_new_key": 3}, "it belongs in the block `zero_optimization`"),
    ({"offload_param": {"device": "cpu"}}, "it belongs in the block `zero_optimization`"),
    ({"loss_scale": 0}, "it belongs in the block `fp16`"),
    ({"lr": 1e-3}, "it belongs in the block `optimizer.params`"),
    ({"warmup_num_steps": 3}, "it belongs in the block `scheduler.params`"),
    ({"block_size": 3}, "it belongs in the block `aio`"),
    ({"micro_batch_size": 3}, "DeepSpeed calls it `train_micro_batch_size_per_gpu`"),
    ({"zero_optimization.stage": 3}, 'a dot is no block: write "zero_optimization": {"stage": ...}'),
    ({"monitor_config": {}}, "which DeepSpeed would ignore; remove it"),
    ({"train_batch_size": "8"}, 'DeepSpeed\'s `train_batch_size` = "8" is text; write 8 without quotes'),
    ({"train_batch_size": 1.5}, "DeepSpeed's `train_batch_size` = 1.5 is not a whole number"),
    ({"train_batch_size": True}, "DeepSpeed's `train_batch_size` = true is not a whole number"),
    ({"train_batch_size": None}, "DeepSpeed key `train_batch_size` = null must be a whole number"),
    ({"gradient_clipping": "1.0"}, 'DeepSpeed\'s `gradient_clipping` = "1.0" is text; write 1.0 without quotes'),
    ({"gradient_clipping": -1}, "DeepSpeed's `gradient_clipping` = -1 must be at least 0"),
    ({"wall_clock_breakdown": "yes"}, 'DeepSpeed key `wall_clock_breakdown` = "yes" must be true or false'),
    ({"wall_clock_breakdown": 1}, "DeepSpeed key `wall_clock_breakdown` = 1 must be true or false"),
    ({"zero_optimization": True}, "DeepSpeed key `zero_optimization` = true must be a block in braces"),
    ({"zero_optimization": None}, "DeepSpeed key `zero_optimization` = null must be a block in braces"),
    ({"zero_optimization": [1]}, "DeepSpeed key `zero_optimization` = [1] must be a block in braces"),
    ({"aio": {"block_size": "1M"}}, 'DeepSpeed key `aio.block_size` = "1M" must be a whole number'),
    ({"aio": {"blok_size": 1}}, "unknown DeepSpeed key `aio.blok_size`, which DeepSpeed would ignore; did you mean `bloc"),
    ({"timers": {"x": 1}}, "unknown DeepSpeed key `timers.x`, which DeepSpeed would ignore; it may hold throughput"),
    ({"optimizer": {"params": {}}}, 'DeepSpeed block `optimizer` has no `type`; write "type": "AdamW"'),
    ({"scheduler": {}}, 'DeepSpeed block `scheduler` has no `type`; write "type": "WarmupCosineLR"'),
    ({"optimizer": {"type": 3}}, "DeepSpeed key `optimizer.type` = 3 must be text"),
    ({"optimizer": {"type": "AdamW", "params": ["lr"]}}, 'DeepSpeed key `optimizer.params` = ["lr"] must be a block in braces'),
    ({"optimizer": {"type": "AdamW", "lr": 1}}, "unknown DeepSpeed key `optimizer.lr`"),
    ({"elasticity": {"enabled": False}}, "DeepSpeed key `elasticity` is not accepted: removed from DeepSpeed in 0.19.8"),
    ({"amp": None}, "DeepSpeed key `amp` is not accepted"),
    ({"activation_checkpointing": {}}, "use `model.gradient_checkpointing: true`"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "words"), JSON_PROBLEMS, ids=[json.dumps(row[0]) for row in JSON_PROBLEMS])
def test_what_is_wrong_in_the_json_is_named_with_its_line_and_a_remedy(files, content, words):
    problem = files.run().json(content).problem()
    assert problem.startswith("ds.json:")
    assert words in problem


def test_the_same_words_hold_for_deepspeed_keys_in_the_run_file(files):
    files.run(deepspeed=["zero_optimisation: {stage: 3}"])
    assert files.problem().startswith("run.yaml:12: unknown DeepSpeed key `zero_optimisation`")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("model", "`model` is missing; write for example\n      model:\n        path:"),
        ("data", "`data` is missing; write for example\n      data:\n        sources:"),
        ("train", "`train` is missing; write for example\n      train:\n        stage: sft"),
        ("checkpoint", "`checkpoint` is missing; write for example\n      checkpoint:\n        folder:"),
    ],
)
def test_a_missing_section_is_shown_as_it_should_be_written(files, section, words):
    tree = yaml.safe_load(files.run().text)
    del tree[section]
    assert words in files.run(yaml.safe_dump(tree)).problem()
    files.run(yaml.safe_dump({**tree, section: "text"}))
    assert f'{section} = "text" must be a block of settings; write for example' in files.problem()
    files.run(yaml.safe_dump(tree) + f"{section}:\n")
    assert any(f"`{section}` has no value; write one, or remove the line" in each for each in files.problems())


def test_an_item_of_a_list_is_named_by_its_number_and_line(files):
    sources = "data:\n  seq_len: 8\n  sources:\n    - path: a\n      format: mesages\n    - pth: b\n    - c.jsonl\n"
    files.run("model: {path: m}\ntrain: {stage: sft}\ncheckpoint: {folder: o}\n" + sources)
    assert files.problems() == [
        "run.yaml:8: data.sources.0.format = \"mesages\" must be one of 'auto', 'text', 'messages', 'sharegpt', "
        "'prompt_response', 'alpaca', 'preference', 'kto', 'tokens'; did you mean `messages`?",
        "run.yaml:9: `data.sources.1.path` is missing; write for example `{path: data/train.jsonl}`",
        "run.yaml:9: unknown setting `data.sources.1.pth`; did you mean `data.sources.path`?",
        'run.yaml:10: data.sources.2 = "c.jsonl" must be a block of settings; write for example `{path: data/train.jsonl}`',
    ]


def test_everything_that_is_wrong_is_shown_at_once_sorted_by_place(files):
    files.run(
        "model: {path: m, path: n}\ndata: {sources: [{path: a}], seq_len: '128'}\ntrain:\n  stage: sft\n  learning_rate: .nan\n"
        "  warmup_steps: 010\n  foo: 1\ncheckpoint: {folder: o}\nmonitor: {log_every_steps: 0}\n"
    )
    files.json('{"zero_optimization": {"stage": "auto"},\n "foo": 1,\n "train_batch_size": 1.5,\n "amp": {},\n "foo": NaN}')
    places = [problem.split(": ")[0] for problem in files.problems("train.x=1", "nonsense")]
    assert places == [
        "--set train.x", "command line", *(f"ds.json:{line}" for line in (1, 2, 3, 4, 5, 5)),
        *(f"run.yaml:{line}" for line in (1, 2, 5, 6, 7, 9)),
    ]  # fmt: skip


def test_an_unreadable_run_file_does_not_hide_what_is_wrong_with_the_json(files):
    files.run("model: [").json({"foo": 1})
    assert [each.split(": ")[0] for each in files.problems()] == ["ds.json:2", "run.yaml:1"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_steps=3", "--set max_steps: unknown setting `max_steps`; it belongs in another place: `train.max_steps`"),
        ("train.max_stepz=3", "--set train.max_stepz: unknown setting `train.max_stepz`; did you mean `train.max_steps`?"),
        ("train.max_steps=abc", '--set train.max_steps: train.max_steps = "abc" is not a whole number'),
        ("train.max_steps=1e2", "train.max_steps = 100.0 is not a whole number; write 100"),
        ("model.path.x=3", '--set model.path.x: model.path = {"x": 3} must be text'),
        (
            "adapter.rank=8",
            "--set adapter.rank: unknown setting `adapter.rank`; it belongs in another place: `adapter.lora.rank`",
        ),
        ("train=3", "--set train: train = 3 must be a block of settings"),
        ("deepspeed.zero_optimisation.stage=3", "--set deepspeed.zero_optimisation.stage: unknown DeepSpeed key"),
        ("deepspeed.config=no.json", "no.json: no such DeepSpeed JSON ("),
    ],
)
def test_overrides_are_held_to_the_same_rules(files, override, words):
    assert any(words in each for each in files.problems(override))


def test_the_last_of_two_overrides_holds_and_blocks_are_merged(files):
    files.run(adapter=["lora: {rank: 4}"])
    resolved = files.resolve("train.max_steps=5", "train.max_steps=6", "adapter={lora: {alpha: 8}}", "adapter.lora.dropout=0.1")
    assert resolved.settings.train.max_steps == 6
    lora = resolved.settings.adapter.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (4, 8, 0.1)
    assert files.resolve("adapter=null").settings.adapter is None
    assert files.problems("adapter={}") == [
        "command line: `adapter={}` is laid on top of the block that is there, and changes nothing. "
        "adapter=null takes the block away."
    ]


def test_resume_of_the_command_line_overrules_with_its_own_origin(files):
    files.run(checkpoint=["resume: never"])
    resolved = files.resolve("checkpoint.resume=auto", resume="out/x/checkpoints/step_00000100")
    assert resolved.settings.checkpoint.resume == "out/x/checkpoints/step_00000100"
    assert str(resolved.origin("checkpoint.resume")) == "--resume"
    assert files.problem(resume="") == (
        '--resume: checkpoint.resume = "" must not be empty; write `resume: auto`, `resume: never` or the path of a checkpoint'
    )


def test_the_deepspeed_option_replaces_the_json_that_the_run_file_names(files):
    files.run(deepspeed=["config: missing.json"])
    assert files.problem().startswith("missing.json: no such DeepSpeed JSON (")
    files.json({"zero_optimization": {"stage": 1}})
    resolved = files.resolve()
    assert resolved.deepspeed_path == "ds.json" == resolved.settings.deepspeed.config
    assert str(resolved.origin("deepspeed.config")) == "--deepspeed"


def test_a_deepspeed_section_that_is_a_path_is_shown_as_it_should_be_written(files):
    files.run(files.run().text + "deepspeed: ds.json\n")
    assert files.problem().endswith("write for example\n      deepspeed:\n        config: ds_configs/zero2.json")


def test_the_result_is_frozen(files):
    resolved = files.resolve()
    with pytest.raises(AttributeError):
        resolved.settings = None
    with pytest.raises(ValueError, match="frozen"):
        resolved.settings.train.seed = 3


def test_the_environment_configures_nothing(files, monkeypatch):
    before = files.resolve()
    for name in ("MAX_STEPS", "TRAIN_MAX_STEPS", "DS_TRAINER_TRAIN_MAX_STEPS", "train.max_steps"):
        monkeypatch.setenv(name, "7")
    assert files.resolve() == before


_DEEPSPEED_PATHS = sorted(
    {*TOP_LEVEL, *(f"{block}.{key}" for block, keys in UNCHECKED_BLOCKS.items() for key in keys)}
    | {each.key for each in SHARED}
    | {row.at.removeprefix("deepspeed.") for row in CONSTRAINTS if row.at.startswith("deepspeed.")}
    | {"bf16.enabled", "fp16.enabled", "scheduler.params.x", "optimizer.params.x", "a.b"}
)
_SCALARS = (None, True, False, 0, 1, 2, 3, -1, 1.5, 1e-5, 10**12, "auto", "x", "", "8", "cpu", "nvme", "AdamW", "OneCycle")
_BLOCKS = ({}, {"type": "AdamW"}, {"type": "WarmupLR", "params": {}}, {"enabled": True}, {"device": "nvme"})
_VALUES = st.sampled_from([*_SCALARS, [], ["lr"], [0.9, 0.95], *_BLOCKS])
_RUN_PATHS = st.sampled_from(
    [f"{section}.{name}" for section in ("model", "data", "train", "monitor", "checkpoint") for name in
     RunSettings.model_fields[section].annotation.model_fields] + ["train", "monitor", "deepspeed", "adapter.lora", "evaluate"]
    + [f"deepspeed.{path}" for path in _DEEPSPEED_PATHS]
)  # fmt: skip


def put(tree, path, leaf):
    *blocks, last = path.split(".")
    for block in blocks:
        if not isinstance(tree.get(block), dict):
            tree[block] = {}
        tree = tree[block]
    tree[last] = json.loads(json.dumps(leaf))


@given(
    st.lists(st.tuples(st.sampled_from(_DEEPSPEED_PATHS), _VALUES), max_size=4),
    st.lists(st.tuples(_RUN_PATHS, _VALUES), max_size=2),
    st.lists(st.tuples(_RUN_PATHS, _VALUES), max_size=2),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_written_is_either_refused_or_shown_complete(files, theirs, ours, overrides):
    tree = yaml.safe_load(files.run().text)
    content: dict = {}
    for path, leaf in theirs:
        put(content, path, leaf)
    for path, leaf in ours:
        put(tree, path, leaf)
    files.run(yaml.safe_dump(tree)).json(content)
    try:
        resolved = resolve(
            "run.yaml", deepspeed="ds.json", overrides=[f"{path}={json.dumps(leaf)}" for path, leaf in overrides]
        )
        shown = check.as_json(resolved, 2, "cuda")
        assert check.as_text(resolved, 2, "cpu")
    except ArgumentsError:
        return
    waiting = {"data_types.keep_in_fp32_modules", *(f"zero_optimization.{name}" for name in _SIZES)}
    autos = {path for path, row in shown["deepspeed"].items() if row["value"] == "auto"}
    assert autos <= waiting, "nothing but what the model has to say is left open"


_SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
