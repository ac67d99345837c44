"""The losses of our objectives on pairs beside TRL's, on the same log-probabilities and values, in float64.

TRL's own code computes its side, called from its package (out/bench/peers) with models that hand out given numbers. ORPO is
compared by its odds-ratio term: TRL's other term also imitates the prompt, ours only the answer, as the paper has it.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from common import in_child, parse_arguments, peers_python

PAIRS, SEED, TOLERANCE = 64, 0, 1e-9
DPO = [("sigmoid", 0.0), ("robust", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
"""TRL 1.16 reads its label_smoothing for `robust` and not for `sigmoid`, so that ours with smoothing has no counterpart."""
BETA, SIMPO_BETA, GAMMA, WEIGHT = 0.3, 2.5, 0.8, 0.4
DESIRABLE, UNDESIRABLE = 1.5, 0.7


def given() -> tuple[dict[str, Any], torch.Tensor]:
    """Log-probabilities of every target under policy and reference, lengths, and values: chosen and rejected in turns.

    And labels of the first answers, for KTO.
    """
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(1, 40, (2 * PAIRS,), generator=generator)
    positions = int(lengths.max())
    mask = torch.arange(positions) < lengths[:, None]
    policy, reference = (
        -torch.rand(2 * PAIRS, positions, generator=generator, dtype=torch.float64) * 3 * mask for _ in range(2)
    )
    values = torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
    # Of every second answer the log-ratio stands for the same prompt with another record's answer.
    wanted = torch.rand(PAIRS, generator=generator) < 0.5
    return {"lengths": lengths, "mask": mask, "policy": policy, "reference": reference, "values": values}, wanted


def margins() -> torch.Tensor:
    """By how much each chosen answer is better."""
    return torch.linspace(-0.5, 2.0, PAIRS, dtype=torch.float64)


def ours() -> dict[str, float]:
    from ds_trainer.objectives import dpo, kto, orpo, reward, simpo

    data, wanted = given()
    ratios = (data["policy"] - data["reference"]).sum(1)
    means = data["policy"].sum(1) / data["lengths"]
    found = {
        f"dpo {loss} {smoothing}": dpo.pair_losses(ratios, data["lengths"], loss=loss, beta=BETA, label_smoothing=smoothing)
        for loss, smoothing in DPO
    }
    found["simpo"] = simpo.pair_losses(means, beta=SIMPO_BETA, gamma=GAMMA)
    found["orpo odds"] = WEIGHT * orpo.pair_losses(means)
    divergence = ratios[1::2].mean().clamp(min=0)
    weights = {"desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}
    found["kto"] = kto.answer_losses(ratios[0::2], wanted, divergence, beta=BETA, **weights)
    found["reward"] = reward.pair_losses(data["values"])
    found["reward with margins"] = reward.pair_losses(data["values"], margins())
    return {name: float(each.mean()) for name, each in found.items()}


def trls() -> dict[str, float]:
    """The same by TRL: chosen answers first, then the rejected ones."""
    from trl import DPOTrainer, RewardTrainer
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    paired, wanted = given()
    data = {name: torch.cat([each[0::2], each[1::2]]) for name, each in paired.items()}
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda each: each, gather_for_metrics=lambda each: each)
    owner = {"model": SimpleNamespace(training=False), "accelerator": accelerator, "_total_train_tokens": 0, "_tp_size": 1}
    sums = data["policy"].sum(1)
    references = data["reference"].sum(1).chunk(2)
    completion = torch.nn.functional.pad(data["mask"], (1, 0)).long()
    found = {}
    for loss, smoothing in DPO:
        trainer = SimpleNamespace(
            **owner,
            _metrics=defaultdict(lambda: defaultdict(list)),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss],
            loss_weights=[1.0],
            beta=BETA,
            label_smoothing=smoothing,
            use_weighting=False,
        )
        nothing = torch.zeros_like(data["policy"])
        output = SimpleNamespace(log_probs=data["policy"], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        inputs = {
            "input_ids": torch.zeros_like(completion),
            "attention_mask": torch.ones_like(completion),
            "completion_mask": completion,
            "ref_chosen_logps": references[0],
            "ref_rejected_logps": references[1],
        }
        result = DPOTrainer._compute_loss(trainer, lambda output=output, **_: output, inputs, False)
        found[f"dpo {loss} {smoothing}"] = float(result)
    chosen, rejected = (sums / data["lengths"]).chunk(2)
    trainer = SimpleNamespace(
        accelerator=accelerator, alpha=0.0, loss_type="simpo", simpo_gamma=GAMMA, beta=SIMPO_BETA, label_smoothing=0.0
    )
    found["simpo"] = float(CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean())
    trainer = SimpleNamespace(accelerator=accelerator, beta=WEIGHT)
    found["orpo odds, in float32"] = -float(ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean())
    found["kto"] = trls_kto(owner, data, wanted, completion)
    trainer = SimpleNamespace(**owner, _metrics=defaultdict(dict), args=SimpleNamespace(center_rewards_coefficient=None))
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    output = SimpleNamespace(logits=data["values"][:, None])
    for name, more in (("reward", {}), ("reward with margins", {"margin": margins()})):
        inputs = {"attention_mask": torch.ones(1), **more}
        found[name] = float(RewardTrainer.compute_loss(trainer, lambda output=output, **_: output, inputs))
    return found


def trls_kto(owner: dict[str, Any], data: dict[str, Any], wanted: torch.Tensor, completion: torch.Tensor) -> float:
    from trl import KTOTrainer

    (policy, others), (reference, reference_of_others) = (data[name].chunk(2) for name in ("policy", "reference"))
    trainer = SimpleNamespace(
        **owner,
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        _compute_kl_logps=lambda model, batch: others.sum(1),
    )
    nothing = torch.zeros_like(policy)
    output = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    mask = completion[: len(policy)]
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": wanted,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": reference_of_others.sum(1),
    }
    return float(KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, False))


def main() -> None:
    arguments = parse_arguments(__doc__)
    if arguments.child:
        import json

        print(json.dumps(trls()))
        return
    own = ours()
    python = peers_python()
    assert python is not None, "TRL could not be installed"
    theirs = in_child(__file__, "trl", python=python)
    worst = 0.0
    for name, value in theirs.items():
        label, _, single = name.partition(",")
        difference = abs(value - own[label])
        print(f"{name:<24} ours {own[label]:.12f}  TRL {value:.12f}  difference {difference:.1e}")
        assert difference <= (1e-6 if single else TOLERANCE), name
        worst = max(worst, 0.0 if single else difference)
    print(f"{len(theirs)} losses agree; the largest difference in float64 is {worst:.1e}")


if __name__ == "__main__":
    main()
