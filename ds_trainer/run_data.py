"""The data of a run: the tokenizer, the rows or the stream, the limits of the model they are fed to, and the steps they make.

`train`, `debug` and `prepare` tell their stories with it; nothing in it needs the engine or another rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.schema import RunSettings
from ds_trainer.data.loader import Windows, windows
from ds_trainer.data.order import Order, passes, positions_of_window, steps_for
from ds_trainer.data.order import total_rows as total_rows_of
from ds_trainer.data.prepare import Show, prepare_rows
from ds_trainer.data.prompts import Prompt, read_prompts
from ds_trainer.data.render import effective_chat_template
from ds_trainer.data.rows import TokenRows
from ds_trainer.data.sources import Report
from ds_trainer.data.store import TokenStore, where
from ds_trainer.data.stream import StreamPlan, StreamWindows, plan_stream
from ds_trainer.errors import DataError
from ds_trainer.loop import Plan
from ds_trainer.model import load
from ds_trainer.model.tokenizer import load_tokenizer
from ds_trainer.protocols import MicroBatch
from ds_trainer.state import TrainState

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """What a run is fed."""

    tokenizer: Any
    rows: TokenRows | None
    """The training data; None when it is streamed."""
    stream: StreamPlan | None
    held_out: dict[str, TokenRows]
    """The held-out sets by name."""
    prompts: tuple[Prompt, ...] = ()
    """What is completed at each evaluation."""

    @property
    def fingerprint(self) -> str:
        """Tells the training data from other data."""
        found = self.rows or self.stream
        assert found
        return found.fingerprint

    @property
    def probe_rows(self) -> TokenRows:
        """The rows whose loss is kept with every checkpoint."""
        rows = next(iter(self.held_out.values()), self.rows)
        assert rows  # a constraint of the settings: a stream is evaluated on held-out data
        return rows


def cache_folder_of(settings: RunSettings) -> Path:
    """Where tokenised data is kept."""
    return Path(settings.data.cache_folder or Path(settings.checkpoint.folder).parent / "data_cache")


def prepare_run_data(
    resolved: Resolved,
    batch: BatchPlan,
    model_config: Any,
    report: Report,
    *,
    head_start: float = 0.0,
    workers: int | None = None,
    show: Show | None = None,
    all_problems: bool = False,
) -> RunData:
    """Load the tokenizer and make the data ready; what the model cannot take is refused, early where that is possible.

    Args:
        resolved: the settings in force.
        batch: a stream is divided by the global batch size.
        model_config: the transformers config of the model.
        report: takes a line for the user.
        head_start: see `prepare_rows`.
        workers: see `prepare_rows`.
        show: see `prepare_rows`.
        all_problems: see `prepare_rows`.
    """
    settings = resolved.settings
    tokenizer = load_tokenizer(settings.model)
    limits = partial(
        load.check_fit,
        model_config,
        seq_len=settings.data.seq_len,
        tokens=len(tokenizer),
        resize=settings.model.resize_vocabulary,
    )
    limits(max_token_id=-1)  # what can be refused before the data is tokenised

    def rows_of(sources: Any, name: str) -> TokenRows:
        return prepare_rows(
            settings.data,
            sources,
            settings.train.stage,
            tokenizer,
            seq_len=settings.data.seq_len,
            cache_folder=cache_folder_of(settings),
            report=lambda line: report(f"{name}: {line}"),
            head_start=head_start,
            workers=workers,
            show=show,
            all_problems=all_problems,
        )

    rows = stream = None
    if settings.data.streaming:
        stream = plan_stream(
            settings.data,
            settings.train.stage,
            tokenizer,
            seed=settings.train.seed,
            global_batch_size=batch.global_batch_size,
            cache_folder=cache_folder_of(settings),
            report=lambda line: report(f"data: {line}"),
        )
    else:
        rows = rows_of(settings.data.sources, "data")
    held_out = {
        name: rows_of(sources, f"held-out data {name}".rstrip())
        for name, sources in (settings.evaluate.held_out if settings.evaluate else {}).items()
    }
    largest = rows.max_token_id if rows else len(tokenizer) - 1
    limits(max_token_id=max([largest, *(each.max_token_id for each in held_out.values())]))
    prompts = prompts_of(settings, tokenizer, model_config)
    return RunData(tokenizer=tokenizer, rows=rows, stream=stream, held_out=held_out, prompts=prompts)


def prompts_of(settings: RunSettings, tokenizer: Any, model_config: Any) -> tuple[Prompt, ...]:
    """The prompts of `evaluate.generate`; none where it is not asked for.

    Raises:
        DataError: the file or a record of it cannot be used, or no position is left for a prompt.
    """
    wanted = settings.evaluate.generate if settings.evaluate else None
    if wanted is None:
        return ()
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if wanted.max_new_tokens >= positions:
        raise DataError(
            f"evaluate.generate.max_new_tokens = {wanted.max_new_tokens} leaves no position for a prompt: the model has "
            f"{positions}. Set it to {positions // 2} or less."
        )
    template = None
    if settings.train.stage != "pretrain":
        template = effective_chat_template(tokenizer, settings.data.chat_template)
    room = positions - wanted.max_new_tokens
    return read_prompts(wanted.prompts, tokenizer, template=template, limit=wanted.max_prompts, room=room)


def plan_steps(resolved: Resolved, rows: TokenRows | None, batch: BatchPlan) -> Plan:
    """How many optimizer steps the run has.

    Raises:
        DataError: the data has fewer rows than one step needs.
    """
    train_settings = resolved.settings.train
    if rows and rows.num_rows < batch.global_batch_size:
        raise DataError(
            f"the data makes {rows.num_rows} rows of {resolved.settings.data.seq_len} positions, fewer than one optimizer step "
            f"needs ({batch}). Use more data, a smaller data.seq_len, or {_smaller_batch(rows.num_rows, batch)}."
        )
    total_rows = None
    if train_settings.max_steps is None:
        assert rows  # a constraint of the settings
        total_rows = total_rows_of(rows.num_rows, train_settings.epochs or 1.0)
        max_steps = steps_for(total_rows, batch.global_batch_size)
    else:
        max_steps = train_settings.max_steps
    return Plan(
        max_steps=max_steps,
        global_batch_size=batch.global_batch_size,
        total_rows=total_rows,
        seed=train_settings.seed,
        on_nonfinite=train_settings.on_nonfinite,
        max_skipped_steps=train_settings.max_skipped_steps,
        patience=resolved.settings.evaluate.patience if resolved.settings.evaluate else None,
    )


def _smaller_batch(rows: int, batch: BatchPlan) -> str:
    ranks = batch.data_parallel_size
    if rows < ranks:
        return f"at most {rows} ranks"
    return f"train.global_batch_size={rows // ranks * ranks} train.micro_batch_size=1"


def length_of(plan: Plan, data: RunData) -> str:
    """How long the run is, in words."""
    rows_fed = plan.total_rows or plan.max_steps * plan.global_batch_size
    text = f"{plan.max_steps:,} steps, {rows_fed:,} rows"
    if data.rows is None:
        return text
    if data.rows.weights:
        each = passes(rows_fed, [pool.num_rows for pool in data.rows.pools], data.rows.weights)
        names = [pool.stores[0].meta["path"] for pool in data.rows.pools]
        return f"{text}: " + ", ".join(f"{count:.2f} epochs of {name}" for name, count in zip(names, each, strict=True))
    return f"{text}, {rows_fed / data.rows.num_rows:.2f} epochs"


def order_of(rows: TokenRows, plan: Plan) -> Order:
    """Which row is fed at which position of a run."""
    return Order(
        num_rows=tuple(pool.num_rows for pool in rows.pools),
        weights=rows.weights,
        seed=plan.seed,
        total_rows=plan.total_rows,
    )


def samples_of_micro_batch(
    rows_consumed: int,
    micro_batch: int,
    data: RunData,
    batch: BatchPlan,
    plan: Plan,
    *,
    rank: int,
    data_parallel_size: int,
) -> list[str]:
    """What one micro-batch of a rank is made of, as path:line of each sample; empty for a stream, which has no order.

    The arguments are those of `samples_of_rows`.
    """
    share = {"rank": rank, "data_parallel_size": data_parallel_size}
    return [each for row in samples_of_rows(rows_consumed, micro_batch, data, batch, plan, **share) for each in row]


def samples_of_rows(
    rows_consumed: int,
    micro_batch: int,
    data: RunData,
    batch: BatchPlan,
    plan: Plan,
    *,
    rank: int,
    data_parallel_size: int,
) -> list[list[str]]:
    """The same row by row, in the order of the row; a row beyond the end of the run has none.

    Args:
        rows_consumed: rows the whole job had consumed before the step.
        micro_batch: its place in the rank's window, from 0.
        data: what the run is fed.
        batch: the solved batch arithmetic.
        plan: seed and end of the run.
        rank: 0 <= rank < data_parallel_size.
        data_parallel_size: ranks that see different rows.
    """
    if data.rows is None:
        return []
    positions = positions_of_window(
        rows_consumed,
        micro_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        rank=rank,
        data_parallel_size=data_parallel_size,
    )
    order = order_of(data.rows, plan)
    rows = [order.row_at(position) for position in positions[micro_batch]]
    samples = [[] if row is None else data.rows.samples(row) for row in rows]
    return [[place_of(store, document) for store, document in each] for each in samples]


def place_of(store: TokenStore, document: int) -> str:
    """Where a document comes from: path:line, and which answer of a pair it is."""
    names = (" (chosen)", " (rejected)") if store.kinds is None else ("", " (the answer of another record)")
    answer = names[document % 2] if store.meta.get("together", 1) == 2 else ""
    return f"{where(store.meta['files_read'], document)}:{store.line(document)}{answer}"


def read_windows(
    resolved: Resolved,
    data: RunData,
    batch: BatchPlan,
    plan: Plan,
    state: TrainState,
    convert: Callable[[MicroBatch], Batch],
    *,
    rank: int,
    data_parallel_size: int,
    report: Report,
) -> Windows[Batch]:
    """The windows of a rank from where a run is, each micro-batch converted ahead of time."""
    settings = resolved.settings
    share: dict[str, Any] = {
        "micro_batch_size": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "rank": rank,
        "data_parallel_size": data_parallel_size,
        "convert": convert,
    }
    if data.stream:
        return StreamWindows(data.stream, state.stream, first_step=state.step, report=report, **share)
    assert data.rows
    return windows(
        data.rows,
        order_of(data.rows, plan),
        first_position=state.rows_consumed,
        workers=settings.data.workers,
        timeout_seconds=settings.data.timeout_seconds,
        **share,
    )
