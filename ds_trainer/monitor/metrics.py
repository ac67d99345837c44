"""Formulas of what is reported. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.4,
    "H100 NVL": 835.4,
    "H100": 989.4,
    "H800": 989.4,
    "GH200": 989.4,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.1,
    "L4": 121.2,
}
"""10^12 operations a second of one device in bf16 and fp16 at most. Words of a device's name -> peak; of several that fit, the
longest counts. Source: NVIDIA's data sheets of each device, the figure without sparsity."""


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Floating-point operations of the model itself, forward and backward; what checkpointing computes anew does not count."""

    per_token: float
    """Of the matrix products with weights."""
    per_pair: float
    """Of the attention, for each pair (token, token it attends to)."""

    def of(self, tokens: float, pairs: float) -> float:
        """Of so many tokens and pairs. One document of n tokens has n (n + 1) / 2 pairs."""
        return self.per_token * tokens + self.per_pair * pairs


def model_flops(weights: Iterable[tuple[str, int, bool]], config: Any) -> ModelFlops:
    """Count what a decoder of matrices and attention computes.

    A weight takes 2 operations a token forward, and twice that backward, of which a frozen one saves the half that is its own
    gradient. An embedding is looked up, unless the head shares it. Of the experts of a mixture, those count that a token is
    sent to. Attention takes 2 operations for each pair and component of query and key, 2 for those of the value, and twice that
    backward.

    Source: Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, "PaLM", appendix B, whose 12 x layers x width x seq_len a
    token is for all pairs of a row, masked ones too: here only those count that attend.

    Args:
        weights: name, number of elements, and whether it is trained; tied ones once.
        config: the transformers config.
    """
    text = config.get_text_config()
    experts = next((n for name in _NUM_EXPERTS if (n := getattr(text, name, None))), None)
    share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
    weights = [each for each in weights if ".original_module." not in each[0]]  # beside a copy that an adapter trains
    tied = not any("lm_head" in name or "score" in name for name, _, _ in weights)
    per_token = sum(
        (6 if trained else 4) * numel * (share if ".experts." in name else 1.0)
        for name, numel, trained in weights
        if tied or "embed" not in name
    )
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = heads * (getattr(text, "qk_head_dim", None) or head_size) + heads * (getattr(text, "v_head_dim", None) or head_size)
    return ModelFlops(per_token, 6.0 * text.num_hidden_layers * width)


_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def uncounted(config: Any, seq_len: int) -> str | None:
    """What a model computes in other ways than `model_flops` counts, in words; None when that is right."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    usual = "sliding_attention" if window else "full_attention"
    kinds = set(getattr(text, "layer_types", None) or [usual]) - {"full_attention"}
    if kinds == {"sliding_attention"}:
        return f"attention in a window of {window} tokens" if window and window < seq_len else None
    if kinds or not hasattr(text, "num_attention_heads"):
        return f"layers of type {', '.join(sorted(kinds)) or text.model_type}"
    return None


def peak_flops(device_name: str) -> float | None:
    """The most operations a second that a device does in bf16 or fp16, by its name; None for one that is not known here."""
    if re.search(r"\bMIG\b", device_name):
        return None  # a part of a device
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def perplexity(loss: float) -> float:
    """exp(loss); infinite instead of an error where it does not fit a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def remaining_seconds(steps_left: int, seconds_per_step: float) -> float:
    """Time to the end at the present pace, evaluations and saves not counted."""
    return steps_left * seconds_per_step


def clock(seconds: float) -> str:
    """A duration as people read it: 45 s, 12 min, 3 h 05."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d}"


def quantity(number: float) -> str:
    """A count with three digits and a letter: 812, 4.1k, 13.2M, 1.02B."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.0f}"


def as_ranges(ranks: Iterable[int]) -> str:
    """Ranks in short, as `0-3, 5`; at most eight runs of them, the rest is counted."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def in_words(metrics: Mapping[str, float]) -> str:
    """The numbers of an objective that one looks at first; empty where there are none."""
    names = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "kl", "router_balance": "router balance"}
    return ", ".join(f"{word} {metrics[name]:.3f}" for name, word in names.items() if name in metrics)
