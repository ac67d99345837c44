"""Where a number that is not finite comes from: module, what it was given, samples; the gradient's module; the forward line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_trainer.debug.culprit import Looks, Place, forward_line, statistics, watched
from ds_trainer.errors import NonFiniteError

ROWS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
"""Two rows of two documents and a padded tail."""
SAMPLES = [["a.jsonl:1", "a.jsonl:2"], ["a.jsonl:7"]]


class Root(torch.autograd.Function):
    """Finite, with an infinite slope where `bad` is."""

    @staticmethod
    def forward(ctx, states, bad):
        ctx.save_for_backward(bad)
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.masked_fill(ctx.saved_tensors[0], float("inf")), None


class Layer(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.spoil = spoil

    def forward(self, states):
        return self.spoil(self.linear(states))


def model_with(spoil, at=1):
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(spoil if index == at else (lambda states: states)) for index in range(3)))


def at_position(row, position):
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[row, position] = True
    return mask[..., None]


def complaint(model, looks=Looks(), positions=ROWS, samples=SAMPLES):  # noqa: B008
    place = Place("step 3, rank 1, micro-batch 2", positions, samples)
    with pytest.raises(NonFiniteError) as caught, watched(model, place, looks):
        model(torch.ones(*positions.shape, 4)).sum().backward()
    assert not any(module._forward_hooks for module in model.modules()), "hooks are gone afterwards"
    return str(caught.value)


def test_the_innermost_module_is_named_with_what_it_was_given_and_the_sample():
    text = complaint(model_with(lambda states: states.masked_fill(at_position(0, 4), float("nan"))))
    assert text.startswith(
        "step 3, rank 1, micro-batch 2: the first output that is not finite is that of 1 (Layer). What it was given is finite. "
        "That is at 1 of 12 positions. There lies a.jsonl:2."
    )
    assert "\n  output: (2, 6, 4) float32, from " in text
    assert "4 of 48 not finite" in text
    assert text.count("all finite") == 1


def test_a_padded_tail_belongs_to_no_sample():
    text = complaint(model_with(lambda states: states.masked_fill(at_position(1, 5), float("inf"))))
    assert "There lies the padding of a row." in text


def test_rows_end_to_end_are_told_apart_by_their_documents():
    end_to_end = torch.cat([ROWS[0, :5], ROWS[1, :4]])[None]
    mask = (torch.arange(9) >= 4)[None, :, None]
    text = complaint(model_with(lambda states: states.masked_fill(mask, float("nan"))), positions=end_to_end)
    assert "That is at 5 of 9 positions. There lies a.jsonl:2, a.jsonl:7." in text


def test_of_a_stream_no_sample_is_named():
    text = complaint(model_with(lambda states: states * float("nan")), samples=[])
    assert "That is at 12 of 12 positions.\n" in text


def test_a_weight_that_is_not_finite_is_named():
    model = model_with(lambda states: states)
    with torch.no_grad():
        model[2].linear.weight[1, 1] = float("nan")
    text = complaint(model)
    assert "is that of 2.linear (Linear). Its weight holds numbers that are not finite." in text
    assert "\n  its weight: (4, 4) float32, from " in text
    assert "1 of 16 not finite" in text


def test_what_is_made_between_two_modules_is_said_to_be():
    class Between(nn.Sequential):
        def forward(self, states):
            return self[1](self[0](states) * float("nan"))

    text = complaint(Between(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert "that of 1 (Linear). What it was given is not finite already: that was made outside of a module." in text


def test_the_gradient_that_stops_being_finite_is_placed_between_two_modules():
    text = complaint(model_with(lambda states: Root.apply(states, at_position(1, 0))))
    assert "the gradient that arrives at the output of 1.linear is not: it was finite at the output of 1, so that" in text
    assert "There lies a.jsonl:7." in text


def test_a_finite_micro_batch_passes_and_leaves_no_hook():
    model = model_with(lambda states: states)
    with watched(model, Place("", ROWS, SAMPLES), Looks()):
        model(torch.ones(2, 6, 4)).sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(each._backward_hooks for each in model.parameters())


def test_anomaly_detection_names_the_line_of_the_forward_pass():
    def spoil(states):
        return states + (states - states.detach()).sqrt() * 0  # the line

    looks = Looks(outputs=False, gradients=False, anomaly=True)
    text = complaint(model_with(spoil), looks)
    assert "returned nan values in its 0th output. The forward line:\n" in text
    assert "test_debug_culprit.py:" in text
    assert "# the line" in text
    assert not torch.is_anomaly_enabled()


def test_a_warning_without_frames_is_no_line():
    assert forward_line("") == "Which line of the forward pass that belongs to, torch does not say."


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "(2,) bfloat16, from 1 to 3, mean 2, all finite"),
        (torch.tensor([[float("nan")], [4.0]]), "(2, 1) float32, from 4 to 4, mean 4, 1 of 2 not finite"),
        (torch.tensor([float("inf")]), "(1,) float32, 1 of 1 not finite"),
        (torch.empty(0), "(0,) float32, not in memory"),
    ],
)
def test_statistics(tensor, words):
    assert statistics(tensor) == words
