"""Find where a number that is not finite comes from: the module, what it was given, the samples; or the forward line.

Hooks are there only inside `watched`: a run that is not watched pays nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ds_trainer.errors import NonFiniteError
from ds_trainer.nonfinite import SHOWN

_LIBRARIES = re.compile(r"/site-packages/(torch|deepspeed)/")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)\n\s*(?P<code>[^\n]*)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Looks:
    """What is looked at, and from which step on."""

    outputs: bool = True
    """What modules give, in the forward pass."""
    gradients: bool = True
    """What arrives at them in the backward pass, and at the parameters."""
    anomaly: bool = False
    """torch's anomaly detection: keeps the traceback of every operation of the forward pass, at several times the cost."""
    from_step: int = 1
    """From 1, as everything that is logged counts."""


@dataclass(frozen=True, slots=True)
class Place:
    """One micro-batch of one rank."""

    words: str
    """Such as "step 312, rank 5, micro-batch 2"."""
    position_ids: Tensor
    """(rows, positions) as the model is fed, which may be all rows end to end; 0 where a document begins."""
    samples: list[list[str]]
    """path:line of each document of each row, in its order; empty where the data cannot tell."""

    def in_words(self, values: Tensor | None = None) -> str:
        """The samples, as the end of a sentence: those where some values are not finite, or where that cannot be told, all.

        Args:
            values: (rows, positions, ...); of another shape, positions are not known.
        """
        fed = [sample for row in self.samples for sample in row]
        if values is None or values.shape[:2] != self.position_ids.shape:
            return _listed("The micro-batch holds", fed)
        wrong = ~torch.isfinite(values.detach().flatten(2) if values.dim() > 2 else values.detach()[..., None]).all(dim=2)
        documents = (self.position_ids == 0).cumsum(dim=1) - 1
        found: list[str] = []
        for row, samples in enumerate([fed] if len(wrong) == 1 else self.samples):  # one row may be all rows end to end
            inside = documents[row][wrong[row]].unique().tolist()
            found += [samples[each] if each < len(samples) else "the padding of a row" for each in inside]
        where = f" That is at {int(wrong.sum())} of {wrong.numel()} positions."
        return where + (_listed("There lies", found) if fed else "")


def _listed(begin: str, samples: list[str]) -> str:
    if not samples:
        return ""
    unique = list(dict.fromkeys(samples))
    more = f" and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
    return f" {begin} {', '.join(unique[:SHOWN])}{more}."


@contextmanager
def watched(model: nn.Module, place: Place, looks: Looks) -> Iterator[None]:
    """Watch one forward and backward inside; works with sharded weights and adapters. Waits for the device after every module.

    Raises:
        NonFiniteError: at the first output or gradient that is not finite, with its module.
    """
    with ExitStack() as stack:
        if looks.anomaly:
            stack.enter_context(_forward_lines(place))
        if looks.outputs or looks.gradients:
            watch = _Watch(place, looks)
            stack.callback(watch.remove)
            watch.add(model)
        yield


class _Watch:
    """Owns the hooks of one micro-batch."""

    def __init__(self, place: Place, looks: Looks) -> None:
        self._place, self._looks = place, looks
        self._handles: list[Any] = []
        self._finite_until: str | None = None
        """The module whose output last had a finite gradient."""

    def add(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            hook = partial(self._output, name or "the model")
            # Before DeepSpeed's own, which release the weights of the module.
            self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and self._looks.gradients:
                self._handles.append(parameter.register_hook(partial(self._parameter_gradient, name)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _output(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        for each in _tensors(output):
            if self._looks.outputs and not _is_finite(each):
                self._blame_output(name, module, {**dict(enumerate(args)), **kwargs}, each)
            if self._looks.gradients and each.requires_grad:
                self._handles.append(each.register_hook(partial(self._gradient, name)))

    def _blame_output(self, name: str, module: nn.Module, inputs: Mapping[Any, Any], output: Tensor) -> NoReturn:
        given = [(str(key), each) for key, value in inputs.items() for each in _tensors(value) if each.is_floating_point()]
        held = [(key, each.detach()) for key, each in module.named_parameters(recurse=False)]
        facts = [f"  input {key}: {statistics(each)}" for key, each in given]
        facts += [f"  its {key}: {statistics(each)}" for key, each in held]
        # What is empty is sharded and not gathered: nothing is known of it.
        if bad := [key for key, each in held if not _is_finite(each)]:
            why = f"Its {', '.join(bad)} holds numbers that are not finite."
        elif any(not _is_finite(each) for _, each in given):
            why = "What it was given is not finite already: that was made outside of a module."
        else:
            why = "What it was given is finite."
        raise NonFiniteError(
            f"{self._place.words}: the first output that is not finite is that of {name} ({type(module).__name__}). {why}"
            f"{self._place.in_words(output)}\n" + "\n".join([f"  output: {statistics(output)}", *facts])
        )

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if _is_finite(gradient):
            self._finite_until = name
            return
        since = "what is made of it, the loss in the end, has an infinite slope or overflows"
        if self._finite_until is not None:
            since = f"it was finite at the output of {self._finite_until}, so that the backward pass between the two makes it"
        raise NonFiniteError(
            f"{self._place.words}: every output is finite, but the gradient that arrives at the output of {name} is not: "
            f"{since}.{self._place.in_words(gradient)}\n  gradient: {statistics(gradient)}"
        )

    def _parameter_gradient(self, name: str, gradient: Tensor) -> None:
        if not _is_finite(gradient):
            raise NonFiniteError(
                f"{self._place.words}: the gradient of {name} is not finite, though what arrives at its module's output is."
                f"{self._place.in_words()}\n  gradient: {statistics(gradient)}"
            )


def statistics(tensor: Tensor) -> str:
    """Shape, type and range of a tensor, and how many of its numbers are not finite, in words."""
    tensor = tensor.detach()
    shape = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    finite = tensor[torch.isfinite(tensor)].float()
    if tensor.numel() == 0:
        return f"{shape}, not in memory"
    wrong = tensor.numel() - finite.numel()
    spread = "" if wrong == tensor.numel() else f", from {finite.min():.3g} to {finite.max():.3g}, mean {finite.mean():.3g}"
    return f"{shape}{spread}, {f'{wrong} of {tensor.numel()} not finite' if wrong else 'all finite'}"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


@contextmanager
def _forward_lines(place: Place) -> Iterator[None]:
    """Anomaly detection of torch, which tells the forward line in a warning, as one error."""
    with warnings.catch_warnings(record=True) as heard, torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            told = next((str(each.message) for each in reversed(heard) if "forward call" in str(each.message)), "")
            raise NonFiniteError(f"{place.words}: {error} {forward_line(told)}{place.in_words()}") from error


def forward_line(told: str) -> str:
    """The lines of the forward pass in torch's warning, innermost first: the one of a model, or of this program."""
    frames = [each for each in _FRAME.finditer(told) if not _LIBRARIES.search(each["file"])]
    lines = [f"  {each['file']}:{each['line']} in {each['name']}: {each['code'].strip()}" for each in reversed(frames[-3:])]
    if not lines:
        return "Which line of the forward pass that belongs to, torch does not say."
    return "\n".join(["The forward line:", *lines, ""])
