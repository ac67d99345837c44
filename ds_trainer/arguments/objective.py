"""Which numbers each stage's objective has, and their values where nobody wrote them."""

from __future__ import annotations

from typing import Any

from ds_trainer.arguments.schema import AdapterSection, RunSettings

NUMBERS: dict[str, dict[str, Any]] = {
    "pretrain": {"router_weight": None},
    "sft": {"router_weight": None},
    "reward": {},
    "dpo": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "reference": "held"},
    "orpo": {"odds_weight": 0.1},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "reference": "held"},
}
"""Stage -> the settings of the section `objective` that it reads, with their defaults: those of the papers."""
_ANSWERS = ("chosen", "rejected")
_REWARDS = tuple(f"rewards/{name}" for name in (*_ANSWERS, "margins", "accuracies"))
_LOG_PROBS = (*(f"logps/{name}" for name in _ANSWERS), "entropy")
METRICS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "sft": (),
    "reward": _REWARDS,
    **dict.fromkeys(("dpo", "orpo", "simpo"), (*_REWARDS, *_LOG_PROBS)),
    "kto": (*_REWARDS[:2], "rewards/accuracies", *_LOG_PROBS, "kl"),
}
"""Stage -> what its objective measures of held-out rows beside the loss."""
GOALS = {"loss": "lowest", "rewards/accuracies": "highest", "rewards/margins": "highest"}
"""Which value of a metric is best, where there is no doubt."""
PAIR_STAGES = ("reward", "dpo", "orpo", "simpo", "kto")
"""Stages whose records are two answers each: a pair, or one and that of another record."""


def numbers_of(settings: RunSettings) -> dict[str, Any]:
    """The numbers of the run's objective in force."""
    written = settings.objective.model_dump(exclude_none=True) if settings.objective else {}
    return {name: written.get(name, default) for name, default in NUMBERS[settings.train.stage].items()}


def metrics_of(settings: RunSettings) -> list[str]:
    """The names that `evaluate.metric` may have."""
    held_out = settings.evaluate.held_out if settings.evaluate else {}
    names = ("loss", *METRICS[settings.train.stage])
    return [f"{each}/{name}" if each else name for each in held_out for name in names]


def goal_of(settings: RunSettings) -> str | None:
    """Whether the lowest or the highest value of `evaluate.metric` is best; None where nobody said."""
    assert settings.evaluate is not None
    known = [goal for name, goal in GOALS.items() if f"/{settings.evaluate.metric}".endswith(f"/{name}")]
    return settings.evaluate.goal or (known[0] if known else None)


def reference_kind(settings: RunSettings) -> str | None:
    """Whether the model before the run is `held` and computed with in each step, or `precomputed`; None: not compared with."""
    return numbers_of(settings).get("reference")


def reference_is_base(adapter: AdapterSection | None) -> bool:
    """Whether the model before the run is the base of its adapter, and so needs no copy.

    Where an adapter is trained further it is not, nor where one takes something out of the base; and where a part of the
    weights is trained there is no base beside it.
    """
    if adapter is None or adapter.beside is None:
        return False
    return adapter.lora is None or (adapter.lora.path is None and adapter.lora.init == "zero")
