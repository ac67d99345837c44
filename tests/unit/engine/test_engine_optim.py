"""Decay where it belongs, and op builds that explain themselves."""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import nn

from ds_trainer.arguments.schema import TrainSection
from ds_trainer.engine import offload
from ds_trainer.engine.optim import parameter_groups
from ds_trainer.errors import BuildError, ModelError


def test_matrices_decay_and_vectors_do_not():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    decay, keep = parameter_groups(model, TrainSection(stage="sft", weight_decay=0.1))
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert [each.ndim for each in decay["params"]] == [2, 2]
    assert [each.ndim for each in keep["params"]] == [1, 1, 1]


def test_a_sharded_matrix_is_still_a_matrix():
    model = nn.Linear(4, 4)
    model.weight.ds_shape = model.weight.shape
    model.weight.data = torch.empty(0)
    (decay, _) = parameter_groups(model, TrainSection(stage="sft", weight_decay=0.1))
    assert decay["params"][0] is model.weight


def rates_of(model, lora_plus=1.0, **settings):
    """Of each weight: (learning rate, decay), through the groups an optimizer gets."""
    train = TrainSection(stage="sft", learning_rate=1.0, weight_decay=0.1, **settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group.get("lr", 1.0), group["weight_decay"])
        for group in parameter_groups(model, train, lora_plus)
        for parameter in group["params"]
    }


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        self.norm = nn.LayerNorm(4, bias=False)
        self.lm_head = nn.Linear(4, 5, bias=False)


def test_each_layer_learns_more_slowly_than_the_one_above_it():
    rates = rates_of(Stack(), layer_learning_rate_decay=0.5)
    assert rates == {
        "lm_head.weight": (1.0, 0.1),
        "norm.weight": (1.0, 0.0),
        "layers.2.weight": (1.0, 0.1),
        "layers.1.weight": (0.5, 0.1),
        "layers.0.weight": (0.25, 0.1),
        "embed_tokens.weight": (0.125, 0.1),
    }
    assert "lr" not in parameter_groups(Stack(), TrainSection(stage="sft", layer_learning_rate_decay=0.5))[0]


def test_the_second_matrix_of_lora_plus_has_its_own_rate():
    model = nn.ModuleDict({"lora_A": nn.Linear(2, 1, bias=False), "lora_B": nn.Linear(1, 2, bias=False)})
    model = nn.ModuleDict({"layers": nn.ModuleList([model])})
    assert rates_of(model, lora_plus=16.0) == {
        "layers.0.lora_A.weight": (1.0, 0.1),
        "layers.0.lora_B.weight": (16.0, 0.1),
    }
    assert "lr" not in parameter_groups(model, TrainSection(stage="sft"), 16.0)[0]


def test_named_weights_do_not_decay():
    assert rates_of(Stack(), no_weight_decay=["embed*"])["embed_tokens.weight"] == (1.0, 0.0)
    with pytest.raises(ModelError, match=r"train\.no_weight_decay: embedding\* matches no weight .*embed_tokens\.weight"):
        rates_of(Stack(), no_weight_decay=["embedding*"])


def test_a_model_without_trainable_parameters_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        parameter_groups(model, TrainSection(stage="sft", weight_decay=0.1))


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(offload.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"needs a C\+\+ compiler.*apt-get install g\+\+.*torch_adam"):
        offload.build_op("cpu_adam", print)


def test_a_lock_of_a_dead_build_is_removed_and_told(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    told: list[str] = []
    offload._remove_stale_lock(tmp_path, told.append)
    assert not lock.exists()
    assert "removed a build lock" in told[0]


def test_a_lock_of_a_living_build_is_left_alone(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.chdir(tmp_path)  # this process now looks like a compiler at work there
    offload._remove_stale_lock(tmp_path, print)
    assert lock.exists()
    os.utime(lock, (time.time() - 3600,) * 2)
    offload._remove_stale_lock(tmp_path, print)
    assert not lock.exists()


def test_an_op_is_examined_without_building_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    found = offload.examine_op("cpu_adam")
    assert found["folder"] == str(folder)
    assert (found["built"], found["lacks"], found["stale_lock_seconds"]) == (False, None, None)
    (folder / "lock").touch()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(offload.shutil, "which", lambda name: None)
    found = offload.examine_op("cpu_adam")
    assert 0 <= found["stale_lock_seconds"] < 60
    assert "needs a C++ compiler" in found["lacks"]
    assert found["compiler"] is None
    assert (folder / "lock").exists()
    (folder / "cpu_adam.so").touch()
    found = offload.examine_op("cpu_adam")
    assert (found["built"], found["lacks"]) == (True, None)
