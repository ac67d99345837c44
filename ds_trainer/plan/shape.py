"""The shape of a model, and what one of its steps keeps in memory: the real model code, run on torch's meta device.

Tensors of the meta device have a shape and no memory, so that a model of any size is built in a moment and a forward and
backward pass of it only does the bookkeeping. What is counted is therefore what transformers, peft and our own head really
keep, and not a formula for one architecture. No weights are read.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_trainer.arguments.constraints import DTYPES
from ds_trainer.arguments.schema import AdapterSection, ModelSection, Recompute
from ds_trainer.errors import ModelError
from ds_trainer.model import load, quantize
from ds_trainer.model.adapter import base_of
from ds_trainer.model.attention import DOCUMENTS
from ds_trainer.model.layers import meta_model, whole_layers
from ds_trainer.model.stack import decoder_layers
from ds_trainer.model.tokenizer import first_line, require_folder
from ds_trainer.monitor.metrics import ModelFlops, model_flops
from ds_trainer.objectives import language_model, reward
from ds_trainer.plan.heap import Heap
from ds_trainer.protocols import ModelBatch

LARGE_BLOCK = 33 << 20
"""From here on glibc asks the system for a block of its own, and gives it back when it is freed; smaller ones stay with the
process. A little above glibc's 32 MiB, since rows are seldom quite full and their blocks a little smaller than planned. Source:
mallopt(3), DEFAULT_MMAP_THRESHOLD_MAX; `engine/build.py` sets the same."""
_FUSED, _FUSED_DOCUMENTS = "plan", "plan_documents"
"""Our names for an attention that never holds the scores, as flash attention on any device, and as `documents` calls it."""
_DEPTHS = (2, 4)
"""Layers of the two traces from which the others follow, in a model whose layers are all alike."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter."""

    name: str
    numel: int
    """Elements of the training type that it is held in."""
    trained: bool
    decays: bool
    """Which of the two groups of the optimizer it is in; see `engine/optim.py`."""
    packed: int = 0
    """Weights in 4 bits that these elements hold; 0: each element is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model without its values."""

    model_type: str
    weights: tuple[Weight, ...]
    """In the order of `model.parameters()`; tied ones once."""
    largest_module: int
    """Elements of the module that holds most itself: what ZeRO-3 gathers at once at least."""
    whole_layer: int
    """Elements of the largest decoder layer that ZeRO-3 may gather whole; see `model/layers.py`. 0: none."""
    whole_layers: int
    """How many may be gathered so."""
    vocabulary_size: int
    num_layers: int
    buffers_bytes: int
    """With the scales of weights in 4 bits, which are whole on every rank too."""
    flops: ModelFlops

    @property
    def total(self) -> int:
        """Parameters, trained or not."""
        return sum(each.packed or each.numel for each in self.weights)

    @property
    def held(self) -> int:
        """Elements of the training type that the parameters take."""
        return sum(each.numel for each in self.weights)

    @property
    def packed(self) -> int:
        """Parameters held in 4 bits."""
        return sum(each.packed for each in self.weights)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(each.numel for each in self.weights if each.trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPeak:
    """The most a forward and backward pass keeps besides parameters, in bytes."""

    total: float
    """Of everything together."""
    small: float
    """What a heap takes for the blocks below LARGE_BLOCK, holes included; 0 but on the CPU."""
    large: float
    """Of the others alone. The peaks may be at different times."""
    forward: float
    """What the backward pass finds: the activations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What decides a trace; equal ones are traced once."""

    model: str
    """The section of the settings, as JSON."""
    adapter: str
    precision: str
    attention: str
    """As `choose_attention` decided."""
    gradient_checkpointing: Recompute
    rows: int
    seq_len: int
    whole_layers: bool
    """The gradients of a decoder layer stay to the end of its backward pass, as where ZeRO-3 gathers it whole, and count."""
    keep_gradients: bool
    """The gradients stay with the parameters to the end of the pass, as at ZeRO-1, and count."""
    on_cpu: bool
    """The heap of small blocks is replayed."""
    value_head: bool = False
    """A reward model, which has that in place of a head with a vocabulary."""


def read_config(model: ModelSection) -> Any:
    """The transformers config of the model, from this machine.

    Raises:
        ModelError: it is not here, with what to write instead; or it cannot be read.
    """
    path = model.path
    if model.config is None and path is not None and not Path(path).exists():
        from transformers import AutoConfig

        require_folder(path, "model.path")
        try:
            return AutoConfig.from_pretrained(
                path, revision=model.revision, trust_remote_code=model.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError):
            raise ModelError(
                f"model.path = {path} is not a folder of this machine, and its config.json is not in the hub's cache here. "
                f"`plan` needs no weights, only that file: hf download {path} config.json; or put a copy in a folder and add "
                "model.path=that/folder. For a model from scratch: model.path=null model.config=path/to/config.json."
            ) from None
    return load.load_config(model)


@lru_cache(maxsize=8)
def read_shape(model: str, adapter: str, precision: str, value_head: bool = False) -> Shape:
    """Parameters and sizes of a model.

    Args:
        model: `settings.model` as JSON.
        adapter: `settings.adapter` as JSON, or "null".
        precision: `train.precision`.
        value_head: it is a reward model.
    """
    built = _build(model, adapter, precision, "eager", gradient_checkpointing=False, value_head=value_head)
    config = base_of(built).config.get_text_config()
    weights = tuple(
        Weight(
            name,
            quantize.held_numel(each),
            each.requires_grad,
            each.dim() >= 2,
            packed=each.numel() if quantize.is_held_in_4_bits(each) else 0,
        )
        for name, each in built.named_parameters()
    )
    whole = whole_layers(built)
    return Shape(
        model_type=base_of(built).config.model_type,
        weights=weights,
        largest_module=max(sum(map(quantize.held_numel, module.parameters(recurse=False))) for module in built.modules()),
        whole_layer=whole.numel,
        whole_layers=len(whole.indices),
        vocabulary_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        buffers_bytes=sum(each.numel() * each.element_size() for each in built.buffers())
        + math.ceil(quantize.SCALE_BYTES * sum(each.packed for each in weights)),
        flops=model_flops(((each.name, each.packed or each.numel, each.trained) for each in weights), config),
    )


def _build(
    model: str,
    adapter: str,
    precision: str,
    attention: str,
    *,
    gradient_checkpointing: Recompute,
    value_head: bool,
    on_cpu: bool = False,
) -> Any:
    """The model as `assemble.build` makes it, on the meta device."""
    section = ModelSection.model_validate_json(model)
    _register_fused()
    built = meta_model(
        read_config(section),
        precision=precision,
        attention=attention,
        trust_remote_code=section.trust_remote_code,
        gradient_checkpointing=gradient_checkpointing,
        adapter=AdapterSection.model_validate_json(adapter) if adapter != "null" else None,
        value_head=value_head,
        quantized=section.quantize is not None,
    )
    if value_head:
        reward.attach(base_of(built))
    else:
        language_model.attach(base_of(built), chunked=section.chunked_loss, as_on="cpu" if on_cpu else "cuda")
    return built


@lru_cache(maxsize=64)
def trace(asked: Traced) -> StepPeak:
    """Run a forward and backward pass on the meta device and count what is alive.

    In a model whose layers are all alike, the peak is a straight line over their number, so that two short traces give any
    depth; not where gradients are kept, which grow in the backward pass while activations go, nor for a heap, whose holes grow
    as they please.

    Raises:
        ModelError: the model decides by the values of its tensors what it computes, so that it cannot be traced.
    """
    attention = {"eager": "eager", DOCUMENTS: _FUSED_DOCUMENTS}.get(asked.attention, _FUSED)
    try:
        built = _build(
            asked.model,
            asked.adapter,
            asked.precision,
            attention,
            gradient_checkpointing=asked.gradient_checkpointing,
            value_head=asked.value_head,
            on_cpu=asked.on_cpu,
        )
        stack = _stack_of_equal_layers(base_of(built))
        alike = asked.gradient_checkpointing in (True, False, "selective")
        if stack is None or not alike or asked.keep_gradients or asked.on_cpu or len(stack[2]) <= _DEPTHS[1]:
            return _run(built, asked)
        owner, name, layers = stack
        found = []
        for depth in _DEPTHS:
            setattr(owner, name, nn.ModuleList(list(layers)[:depth]))
            found.append(_run(built, asked))
    except ModelError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            "this model cannot be traced without its weights, so that `plan` does not know its activations "
            f"({type(error).__name__}: {first_line(error)}). Does its config belong to a model that trains?"
        ) from error
    first, second = found
    more = (len(layers) - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])

    def at_full_depth(field: str) -> float:
        return float(getattr(first, field) + more * (getattr(second, field) - getattr(first, field)))

    return StepPeak(**{field: at_full_depth(field) for field in ("total", "small", "large", "forward")})


def _stack_of_equal_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """Where the layers of a model are, if they are all alike: their owner, its name for them, and the list."""
    found = decoder_layers(model)
    if found is None or len(found[2]) < 2:
        return None
    shapes = [[(name, each.shape, each.requires_grad) for name, each in layer.named_parameters()] for layer in found[2]]
    return found if all(each == shapes[0] for each in shapes) else None


def _run(model: Any, asked: Traced) -> StepPeak:
    fused = asked.attention == DOCUMENTS or asked.attention.startswith("flash")
    rows, positions = (1, asked.rows * asked.seq_len) if fused else (asked.rows, asked.seq_len)
    ids = torch.zeros(rows, positions, dtype=torch.long, device="meta")
    num_targets = 2 * asked.rows if asked.value_head else ids.numel()  # a value is read once an answer
    batch = ModelBatch(
        inputs={
            "input_ids": ids,
            "position_ids": ids,
            "use_cache": False,
            # A mask of four dimensions is taken as it is; without one, transformers looks at the values of the positions.
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=getattr(torch, DTYPES[asked.precision]), device="meta"),
        },
        target_positions=torch.zeros(num_targets, dtype=torch.long, device="meta"),
        targets=torch.zeros(num_targets, dtype=torch.long, device="meta"),
        num_tokens=ids.numel(),
        attention_pairs=ids.numel(),
    )
    hooks: list[Any] = []
    found = decoder_layers(base_of(model)) if asked.whole_layers else None
    # All but the first: where its input has no gradient, its hook comes too early, see `model/layers.py`.
    whole = list(found[2])[1:] if found else []
    delayed = {id(each) for layer in whole for each in layer.parameters()}
    hooks += [layer.register_full_backward_hook(_drop_gradients) for layer in whole]
    if not asked.keep_gradients:
        for each in model.parameters():
            if each.requires_grad and id(each) not in delayed:
                hooks.append(each.register_post_accumulate_grad_hook(_drop_gradient))
    counter = _Alive(model, Heap() if asked.on_cpu else None)
    try:
        with counter:
            loss = language_model.nll_sum(model, batch).sum()  # of values, for a reward model
            forward = sum(counter.now)
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    small = counter.heap.peak if counter.heap else 0
    return StepPeak(total=counter.total, small=small, large=counter.peak_of_large, forward=forward)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _drop_gradients(layer: nn.Module, *gradients: Any) -> None:
    layer.zero_grad(set_to_none=True)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still alive; parameters and buffers do not count."""

    def __init__(self, model: nn.Module, heap: Heap | None) -> None:
        super().__init__()
        kept = [*model.parameters(), *model.buffers()]
        self._seen = {each.untyped_storage()._cdata: 0 for each in kept}
        self.heap = heap
        """Of the small blocks."""
        self.now = [0, 0]
        """Small and large."""
        self.peak_of_large = 0
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                size = storage.nbytes()
                if size and storage._cdata not in self._seen:
                    self._seen[storage._cdata] = size
                    which = int(size >= LARGE_BLOCK)
                    self.now[which] += size
                    if self.heap and not which:
                        self.heap.allocate(storage._cdata, size)
                    weakref.finalize(storage, self._gone, storage._cdata, which)
                    self.peak_of_large = max(self.peak_of_large, self.now[1])
                    self.total = max(self.total, sum(self.now))
        return result

    def _gone(self, key: int, which: int) -> None:
        self.now[which] -= self._seen.pop(key)
        if self.heap and not which:
            self.heap.free(key)


@lru_cache(maxsize=1)
def _register_fused() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for name, function in ((_FUSED, _fused_attention), (_FUSED_DOCUMENTS, _fused_documents)):
        AttentionInterface.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, lambda *args, **kwargs: None)


@lru_cache(maxsize=1)
def _attention_operation() -> Any:
    """An operation that keeps what a fused attention keeps: query, key, value, output, and one fp32 number a query and head.

    A whole operation, and not the ones it is made of, so that a policy of what is computed again sees it as such. Source: Dao
    et al. 2022, "FlashAttention", section 3.1; torch 2.13, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, *output)

    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])

    torch.library.define("ds_trainer::attention", "(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
    torch.library.impl("ds_trainer::attention", "Meta", forward)
    torch.library.register_autograd("ds_trainer::attention", backward, setup_context=keep)
    return torch.ops.ds_trainer.attention


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    output: Tensor = _attention_operation()(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None  # kernels write (rows, positions, heads, head_size): no copy


def _fused_documents(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As `model/attention.py` puts the documents' outputs together: what each call kept, and a copy in one piece."""
    output: Tensor = _attention_operation()(query, key, value)[0]
    return output.transpose(1, 2).clone(memory_format=torch.contiguous_format), None
