"""Attention over packed rows: documents in one row must never see one another.

transformers isolates packed documents only under conditions that its default call does not meet (no cache, no mask, positions
that restart; flash attention also wants one row). So the layout is made here, in one place, for the implementation
that is used, and `probe_isolation` proves on the real model, before the first step, that it holds.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_trainer.errors import ModelError
from ds_trainer.protocols import IGNORED, OTHERS, UNUSED, UNWANTED, WANTED, MicroBatch, ModelBatch

DOCUMENTS = "documents"
"""Our implementation: no masked pair is ever computed. On a GPU one call for all short documents, else one call for each."""
LONG_DOCUMENT = 2048
"""Documents of so many positions on average fill a GPU one by one, and the kernel for one is the faster one.

Source: `scripts/bench/gpu.sh attention`.
"""


def choose_attention(asked: str, config: Any, device_type: str, precision: str) -> str:
    """Decide which attention implementation is used.

    Args:
        asked: `model.attention`; anything but `auto` is taken as it is.
        config: the model's transformers config.
        device_type: `cuda` or `cpu`.
        precision: `bf16`, `fp16` or `fp32`.

    Raises:
        ModelError: what was asked for cannot train on this device.
    """
    if asked == "flex_attention" and device_type == "cpu":
        # Source: torch 2.13, nn/attention/flex_attention.py, _validate_device
        raise ModelError(
            "model.attention: flex_attention computes no gradients on the CPU. Write `auto`, which isolates packed documents "
            "on any device."
        )
    if asked != "auto":
        return asked
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) or text.model_type == "gpt_oss":
        return "eager"  # scores that are capped, or share their softmax with a sink: transformers has no sdpa for them
    if getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None):
        return "sdpa"  # transformers' own masks know which pairs attend
    if device_type == "cuda" and precision != "fp32" and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return DOCUMENTS


def register_document_attention() -> None:
    """Make `documents` a name that transformers accepts as an attention implementation."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(DOCUMENTS, _document_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(DOCUMENTS, lambda *args, **kwargs: None)


def _document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    document_bounds: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of one row.

    Args:
        module: the attention module.
        query: (1, heads, positions, head_size).
        key: (1, key_value_heads, positions, head_size).
        value: (1, key_value_heads, positions, head_size).
        attention_mask: None; documents are told apart by their lengths.
        scaling: factor on the scores.
        dropout: probability of dropping a score.
        document_lengths: positions of each document, on the host; None for a call that packs nothing, as generation does.
        document_bounds: (documents + 1,) int32, where each starts and the last one ends, on the device.
        **kwargs: what else transformers hands on; what would change the scores is refused.

    Returns:
        (1, positions, heads, head_size), None.
    """
    unsupported = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if unsupported or attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unsupported) or 'a mask'}, which "
            "`attention: documents` does not compute. Set model.attention: sdpa."
        )
    if document_lengths is None and query.shape[2] == 1:  # generation with a cache: the last token attends to all before it
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return output.transpose(1, 2).contiguous(), None
    lengths = document_lengths or (query.shape[2],)
    short = query.shape[2] < LONG_DOCUMENT * len(lengths)
    if short and document_bounds is not None and dropout == 0.0 and _fits_varlen(query):
        heads_last = (each[0].transpose(0, 1) for each in (query, key, value))
        longest = max(lengths)
        packed: Tensor = _varlen(query.device)(*heads_last, document_bounds, document_bounds, longest, longest, scale=scaling)
        return packed[None], None
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=grouped
        )
        for q, k, v in zip(*(each.split(lengths, dim=2) for each in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _fits_varlen(query: Tensor) -> bool:
    """Whether torch's attention for packed documents takes these queries (1, heads, positions, head_size).

    Source: torch 2.11, aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_varlen_fwd.
    """
    size = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and size % 8 == 0 and size <= 256 and _varlen(query.device) is not None


@cache
def _varlen(device: torch.device) -> Any:
    """The attention of torch for packed documents, causal in each.

    None before torch 2.11, where it cannot scale the scores; and on devices that have no flash attention: it takes Ampere.
    """
    too_old = torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0)
    if too_old or not importlib.util.find_spec("torch.nn.attention.varlen"):
        return None
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    if "window_size" not in takes:
        return None
    # torch 2.11 takes fewer keys than queries unasked.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in takes else {}
    return partial(varlen_attn, window_size=(-1, 0), **grouped)


def arrange(batch: MicroBatch, implementation: str, *, pin: bool = False) -> ModelBatch:
    """Lay a micro-batch out as the attention implementation needs it, on the CPU.

    `documents` and flash attention get one row of all documents end to end, without the padding; the others get the rows
    as they are, and derive their mask from the positions, which restart with each document.

    Args:
        batch: rows of the loader, on the CPU.
        implementation: as `choose_attention` decided.
        pin: put it into memory that a GPU copies from without waiting.
    """
    if batch.kinds is not None:
        own, ahead = (arrange(_only(batch, kinds), implementation, pin=pin) for kinds in ((UNWANTED, WANTED), (OTHERS, UNUSED)))
        wanted = batch.kinds[(batch.kinds == UNWANTED) | (batch.kinds == WANTED)] == WANTED
        counted = batch.kinds[(batch.kinds == OTHERS) | (batch.kinds == UNUSED)] == OTHERS
        ahead = replace(ahead, wanted=counted, num_wanted=int(counted.sum()))
        return replace(own, wanted=wanted, num_wanted=int(wanted.sum()), ahead=ahead)

    def pinned(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pin else tensor

    input_ids, labels, positions = batch.input_ids, batch.labels, batch.position_ids
    extra: dict[str, Any] = {}
    if implementation == DOCUMENTS or implementation.startswith("flash"):
        kept = batch.is_token.flatten()
        if not bool(kept.any()):
            kept[0] = True  # a rank without rows still takes part in every collective
        input_ids, labels, positions = (each.flatten()[kept][None] for each in (input_ids, labels, positions))
        starts = torch.cat([(positions[0] == 0).nonzero().flatten(), torch.tensor([positions.shape[1]])])
        lengths = starts.diff()
        boundaries = pinned(starts.to(torch.int32))
        if implementation == DOCUMENTS:
            extra = {"document_lengths": tuple(lengths.tolist()), "document_bounds": boundaries}
        else:
            longest = int(lengths.max())
            extra = {
                "cu_seq_lens_q": boundaries,
                "cu_seq_lens_k": boundaries,
                "max_length_q": longest,
                "max_length_k": longest,
            }
    target_positions = (labels.flatten() != IGNORED).nonzero().flatten()
    targets = labels.flatten()[target_positions]
    document = (positions.flatten() == 0).cumsum(0)[target_positions]
    sequence_lengths = document.unique_consecutive(return_counts=True)[1]
    assert all(len(each) == len(sequence_lengths) for each in batch.numbers.values()), "each document has a target"
    return ModelBatch(
        inputs={
            "input_ids": pinned(input_ids),
            "position_ids": pinned(positions),
            "use_cache": False,  # with a cache, transformers does not look for packed documents
            **extra,
        },
        target_positions=pinned(target_positions),
        targets=pinned(targets),
        num_tokens=batch.num_tokens,
        attention_pairs=int((batch.position_ids + 1)[batch.is_token].sum()),
        sequence_lengths=pinned(sequence_lengths),
        numbers={name: pinned(each) for name, each in batch.numbers.items()},
    )


def _only(batch: MicroBatch, kinds: tuple[int, ...]) -> MicroBatch:
    """A micro-batch of its documents of some kinds; the others become padding, which layouts without padding leave out."""
    assert batch.kinds is not None
    document = ((batch.position_ids == 0) & batch.is_token).flatten().cumsum(0).reshape(batch.is_token.shape) - 1
    is_kept = torch.isin(batch.kinds, torch.tensor(kinds))
    kept = batch.is_token & is_kept[document.clamp(min=0)]
    return MicroBatch(
        input_ids=batch.input_ids,
        labels=torch.where(kept, batch.labels, IGNORED),
        position_ids=batch.position_ids,
        is_token=kept,
        numbers={name: each[is_kept] for name, each in batch.numbers.items()},
    )


def probe(vocabulary_size: int, implementation: str, *lengths: int, skipped: int = 0) -> ModelBatch:
    """A row of documents with so many tokens, which are always the same, on the CPU; nothing of it is a target.

    Args:
        vocabulary_size: ids are below it.
        implementation: the attention implementation in use.
        lengths: of the documents.
        skipped: so many tokens of the series are left out before the first document.
    """
    ids = (torch.arange(sum(lengths)) + skipped) * 7919 % vocabulary_size
    rows = MicroBatch(
        input_ids=ids[None],
        labels=torch.full_like(ids, IGNORED)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        is_token=torch.ones_like(ids, dtype=torch.bool)[None],
    )
    return arrange(rows, implementation)


def difference_of(states: Tensor, expected: Tensor) -> tuple[float, float]:
    """How far states are from those expected, as a share of their norm; and how much rounding explains."""
    difference = ((states - expected).float().norm() / expected.float().norm().clamp_min(1e-12)).item()
    return difference, 1e-4 if expected.dtype == torch.float32 else 2e-2


def probe_isolation(
    states: Callable[[ModelBatch], Tensor], implementation: str, vocabulary_size: int, device: torch.device
) -> None:
    """Prove on the real model that a document is computed as if it were alone in its row.

    Two documents are fed packed and the second one alone; what the model makes of the second must be the same. Collective
    under ZeRO-3: every rank.

    Args:
        states: the model's last hidden states (rows, positions, hidden_size) for a batch, without gradients.
        implementation: the attention implementation in use.
        vocabulary_size: ids of the probe are below it.
        device: where the model is.

    Raises:
        ModelError: the documents see one another.
    """
    first, second = 9, 7
    packed = states(probe(vocabulary_size, implementation, first, second).to(device))[0, first:]
    alone = states(probe(vocabulary_size, implementation, second, skipped=first).to(device))[0]
    difference, tolerance = difference_of(packed, alone)
    if not difference <= tolerance:
        raise ModelError(
            f"attention `{implementation}` lets packed documents of this model see one another (a document's states change "
            f"by {difference:.1e} of their norm when another is packed before it; allowed {tolerance:.0e}). "
            "Set model.attention to another implementation, or data.packing: false."
        )
