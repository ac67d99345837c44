"""How fast this rank itself computes, told apart from how long it waits for others.

A step takes equally long on every rank, since the ranks wait for one another in its collectives; under ZeRO-3 even a forward
does, for it gathers weights layer by layer. No rank waits in the forward of a module without children: DeepSpeed's hooks gather
before it and release after it. So that is what is measured, in the first micro-batch of each step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

MEASURED_MODULES = 64
"""The largest ones: most of the work of a model, for two clock readings each."""


class Pace:
    """Measures from a call to the next. On a GPU by events of the device, which cost no wait."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Watch a model; after `deepspeed.initialize`, so that its own hooks lie outside of these."""
        self._event: Any = None
        if device.type == "cuda":
            self._event = lambda: torch.cuda.Event(enable_timing=True)
        self._spans: list[list[tuple[Any, Any]]] = []
        self._begun: Any = None
        leaves = [each for each in model.modules() if not list(each.children()) and list(each.parameters(recurse=False))]
        leaves.sort(key=lambda each: sum(getattr(own, "ds_numel", own.numel()) for own in each.parameters()), reverse=True)
        self._leaves = leaves[:MEASURED_MODULES]

    @contextmanager
    def measured(self) -> Iterator[None]:
        """One forward of a step. The hooks are there for it only: all other forwards cost nothing."""
        self._spans.append([])
        hooks = [leaf.register_forward_pre_hook(self._begin) for leaf in self._leaves]
        hooks += [leaf.register_forward_hook(self._end, prepend=True) for leaf in self._leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def lap(self) -> list[float]:
        """Seconds of each forward since the last call. On a GPU the device must have been waited for."""
        spans, self._spans = self._spans, []
        if self._event is None:
            return [sum(end - begin for begin, end in step) for step in spans]
        return [sum(begin.elapsed_time(end) for begin, end in step) / 1000 for step in spans]

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event()
        event.record()
        return event

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._begun = self._now()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._spans[-1].append((self._begun, self._now()))
