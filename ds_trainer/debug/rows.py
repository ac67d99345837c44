"""Show rows as the model sees them: which rank feeds them, the sample each document comes from, which tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from ds_trainer.prepare import marked
from ds_trainer.protocols import IGNORED, MicroBatch


def shown_rows(
    tokenizer: Any, batches: Sequence[tuple[str, MicroBatch, list[list[str]]]], count: int, step: int, colours: bool
) -> list[Text]:
    """The first rows of some micro-batches, decoded, with the trained tokens marked.

    Args:
        tokenizer: of the run.
        batches: whose micro-batch it is, in words that may be empty; its rows; the samples of each row.
        count: how many rows.
        step: they belong to, from 1.
        colours: the terminal has them.
    """
    rows = [(whose, batch, row, samples) for whose, batch, samples in batches for row in range(batch.input_ids.shape[0])][
        :count
    ]
    if not rows:
        return []
    marks = "green: trained, dim: not" if colours else "[[trained]], the rest is not"
    shown = [Text(f"the first rows of step {step} as the model sees them ({marks})", style="bold")]
    for number, (whose, batch, row, samples) in enumerate(rows):
        title = Text(f"row {number}{f' ({whose})' if whose else ''}: ", style="bold")
        shown.append(title.append(decoded_row(tokenizer, batch, row, samples[row] if samples else [], colours)))
    return shown


def decoded_row(tokenizer: Any, batch: MicroBatch, row: int, samples: Sequence[str], colours: bool) -> Text:
    """One row as text; a token is trained when the position before it has it as its label.

    Args:
        tokenizer: of the run.
        batch: the row is one of.
        row: its place there.
        samples: path:line of each document of the row, in its order; empty where nothing is known of them.
        colours: the terminal has them.
    """
    length = int(batch.is_token[row].sum())
    ids = batch.input_ids[row, :length].tolist()
    labels = batch.labels[row, :length].tolist()
    starts = batch.position_ids[row, :length].tolist()
    trained = [False, *(label != IGNORED for label in labels[:-1])]
    text = Text(f"{length} tokens, {sum(trained)} trained\n", style="bold")
    documents = [at for at in range(length) if starts[at] == 0]
    for number, (begin, end) in enumerate(pairwise([*documents, length])):
        text.append(f"--- {samples[number] if number < len(samples) else 'document'}\n", style="bold")
        text.append(marked(tokenizer, ids[begin:end], trained[begin:end], colours)).append("\n")
    return text
