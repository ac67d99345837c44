import json
import os
from collections import Counter
from itertools import chain

import pytest

from ds_trainer.arguments.schema import DataSection, Source
from ds_trainer.data import prepare, readers, stream
from ds_trainer.data.stream import StreamWindows, plan_stream
from ds_trainer.errors import DataError
from ds_trainer.protocols import IGNORED

SEQ_LEN = 8


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Many lanes and many chunks of a small file. Workers are not told: chunks are cut here."""
    monkeypatch.setattr(readers, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    monkeypatch.setattr(stream, "LANE_BYTES", 256)


@pytest.fixture
def plan_of(tokenizer, tmp_path, reports):
    def plan(*given, stage="pretrain", batch=4, seed=0, workers=0, **settings):
        given = [each if isinstance(each, Source) else Source(path=str(each)) for each in given]
        data = DataSection(sources=given, seq_len=SEQ_LEN, streaming=True, workers=workers, **settings)
        return plan_stream(
            data,
            stage,
            tokenizer,
            seed=seed,
            global_batch_size=batch,
            cache_folder=tmp_path / "cache",
            report=reports.append,
        )

    return plan


@pytest.fixture
def numbered(write):
    """Files of one-word texts whose first token names the record: characters that are a token each."""

    def make(name, *counts, first=0):
        paths = []
        for number, count in enumerate(counts):
            records = [{"text": name_of(first + n)} for n in range(count)]
            paths.append(write(f"{name}/{number}.jsonl", *records))
            first += count
        return paths[0].parent / "*.jsonl"

    return make


def name_of(number):
    return f"{number:04d}"


def documents(batch, tokenizer):
    """The texts of each row."""
    rows = []
    for ids, positions, is_token in zip(batch.input_ids, batch.position_ids, batch.is_token, strict=True):
        ids, positions = ids[is_token].tolist(), positions[is_token].tolist()
        starts = [at for at, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(ids)]
        rows.append(tuple(tokenizer.decode(ids[a:b]).removesuffix("</s>") for a, b in zip(starts, ends, strict=True)))
    return rows


class Run:
    """All ranks of a run, step by step."""

    def __init__(self, plan, tokenizer, layout, cursors=None, first_step=0):
        self.ranks, self.micro, self.accumulation = layout
        self.reports = []
        self.windows = [
            StreamWindows(
                plan,
                dict(cursors or {}),
                first_step=first_step,
                micro_batch_size=self.micro,
                gradient_accumulation_steps=self.accumulation,
                rank=rank,
                data_parallel_size=self.ranks,
                convert=lambda batch: documents(batch, tokenizer),
                report=self.reports.append,
            )
            for rank in range(self.ranks)
        ]

    def step(self):
        """The rows of a step, sorted: those of one step may come on any rank."""
        per_rank = [next(each) for each in self.windows]
        assert all([len(rows) for rows in window] == [self.micro] * self.accumulation for window in per_rank)
        return sorted(row for window in per_rank for rows in window for row in rows)

    def steps(self, count):
        return [self.step() for _ in range(count)]

    @property
    def cursors(self):
        """As a checkpoint merges them."""
        merged = {}
        for each in self.windows:
            for name, cursor in each.cursors.items():
                assert merged.setdefault(name, cursor) == cursor  # ranks that share a lane agree
        return json.loads(json.dumps(merged))

    def close(self):
        for each in self.windows:
            each.close()


@pytest.fixture
def run(tokenizer):
    runs = []

    def start(*arguments, **named):
        runs.append(Run(*arguments[:1], tokenizer, *arguments[1:], **named))
        return runs[-1]

    yield start
    for each in runs:
        each.close()


LAYOUTS = [(1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)]
FILES = {"one file": (150,), "few files": (60, 7, 50), "many files": (9, 14, 20, 8, 12, 30, 25)}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
@pytest.mark.parametrize("packing", [True, False])
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(numbered, plan_of, run, files, packing):
    plan = plan_of(numbered("a", *files), packing=packing)
    assert plan.lanes > 1
    first, *others = [run(plan, layout).steps(30) for layout in LAYOUTS]
    assert all(other == first for other in others)
    assert len({row for step in first for row in step}) > 20


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
@pytest.mark.parametrize("stop", [0, 1, 5, 23])
def test_a_stream_goes_on_with_the_very_next_row_on_any_number_of_ranks(numbered, plan_of, run, files, stop):
    plan = plan_of(numbered("a", *files))
    whole = run(plan, (1, 4, 1)).steps(30)
    for before, after in (((1, 4, 1), (2, 1, 2)), ((4, 1, 1), (1, 2, 2)), ((2, 1, 2), (2, 1, 2))):
        begun = run(plan, before)
        assert begun.steps(stop) == whole[:stop]
        resumed = run(plan, after, cursors=begun.cursors, first_step=stop)
        assert resumed.steps(7) == whole[stop : stop + 7]
        again = run(plan, before, cursors=resumed.cursors, first_step=stop + 7)
        assert again.steps(30 - stop - 7) == whole[stop + 7 :]


def test_more_ranks_than_lanes_share_them(numbered, plan_of, run):
    plan = plan_of(numbered("a", 40), batch=12)
    assert 1 < plan.lanes < 6
    whole = run(plan, (1, 12, 1)).steps(12)
    for ranks in (6, 12):
        begun = run(plan, (ranks, 12 // ranks, 1))
        assert begun.steps(5) == whole[:5]
        assert run(plan, (4, 3, 1), cursors=begun.cursors, first_step=5).steps(7) == whole[5:]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_ahead_in_processes_changes_nothing_and_a_position_is_that_of_the_rows_taken(numbered, plan_of, run, workers):
    path = numbered("a", 60, 60)
    whole = run(plan_of(path), (1, 4, 1)).steps(20)
    plan = plan_of(path, workers=workers)
    begun = run(plan, (1, 4, 1))
    assert begun.steps(9) == whole[:9]
    cursors = begun.cursors
    begun.close()
    assert run(plan, (1, 2, 2), cursors=cursors, first_step=9).steps(11) == whole[9:]


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
@pytest.mark.parametrize("packing", [True, False])
def test_a_lane_feeds_every_record_once_before_any_twice(numbered, plan_of, run, files, packing):
    plan = plan_of(numbered("a", *files), packing=packing)
    total = sum(files)
    running = run(plan, (1, 4, 1))
    lanes, epochs = {}, {}
    for lane in range(plan.lanes):
        lanes[lane], epochs[lane] = [], set()
    while any(cursor[0] < 1 for cursor in running.cursors.values()) or not running.cursors:
        before = running.cursors
        [window] = [next(each) for each in running.windows]
        rows = list(chain(*window))
        per_lane = 4 // plan.lanes
        for lane in range(plan.lanes):
            if running.cursors[f"0.{lane}"][0] == 0:
                lanes[lane] += chain(*rows[lane * per_lane : (lane + 1) * per_lane])
        assert before != running.cursors
    fed = Counter(chain(*lanes.values()))
    assert max(fed.values()) == 1
    # What is missing was fed in the step in which its lane went on to the next epoch.
    assert total - len(fed) <= 4 * SEQ_LEN
    assert set(fed) <= {name_of(number) for number in range(total)}


def test_one_lane_feeds_every_record_exactly_once_an_epoch(numbered, plan_of, run):
    plan = plan_of(numbered("a", 40, 23, 1), batch=1)
    assert plan.lanes == 1
    fed, running = [], run(plan, (1, 1, 1))
    for _ in range(160):
        fed += [text for row in running.step() for text in row]
    everything = sorted(name_of(number) for number in range(64))
    assert sorted(fed[:64]) == everything
    assert sorted(fed[64:128]) == everything
    assert fed[:64] != fed[64:128]
    assert fed[:64] != everything


def test_small_files_are_shared_out_over_all_lanes(numbered, plan_of, run):
    """Or the first lanes would have all of them, and go through the rest less often."""
    plan = plan_of(numbered("a", 150, 3, 3, 3), batch=8)
    assert plan.lanes == 8
    assert len(plan.found[0].files) < plan.lanes
    running = run(plan, (1, 8, 1))
    running.step()
    from_small = set()
    for _ in range(40):
        [window] = [next(each) for each in running.windows]
        for slot, row in enumerate(window[0]):
            from_small |= {slot for text in row if int(text) >= 150}
    assert len(from_small) >= 3


def test_another_seed_gives_another_order(numbered, plan_of, run):
    path = numbered("a", 60, 60)
    first, second = (run(plan_of(path, seed=seed), (1, 4, 1)).steps(5) for seed in (0, 1))
    assert first != second


def test_weights_are_honoured_to_within_a_row(numbered, plan_of, run):
    a, b = numbered("a", 60), numbered("b", 60, first=1000)
    plan = plan_of(Source(path=str(a), weight=0.7), Source(path=str(b), weight=0.3))
    whole = run(plan, (1, 4, 1)).steps(25)
    rows = from_b = 0
    for step in whole:
        rows += 4
        from_b += sum(row[0] >= "1000" for row in step)
        assert abs(from_b - 0.3 * rows) < 1
        assert all(len({text >= "1000" for text in row}) == 1 for row in step)
    begun = run(plan, (2, 1, 2))
    assert begun.steps(13) == whole[:13]
    assert run(plan, (4, 1, 1), cursors=begun.cursors, first_step=13).steps(12) == whole[13:]


@pytest.mark.parametrize(("weights", "batch"), [((1.0, 1.0), 4), ((1.0, 1.0), 8), ((3.0, 1.0), 4), ((0.9, 0.1), 20)])
def test_every_lane_feeds_every_source_whatever_the_weights(numbered, plan_of, run, weights, batch):
    a, b = numbered("a", *[3] * 40), numbered("b", *[3] * 40, first=1000)
    plan = plan_of(*(Source(path=str(path), weight=weight) for path, weight in zip((a, b), weights, strict=True)), batch=batch)
    assert plan.lanes > 1
    running = run(plan, (1, batch, 1))
    steps = running.steps(1200 // batch)
    assert len(running.cursors) == 2 * plan.lanes
    fed = Counter(text for step in steps for row in step for text in row)
    assert set(fed) == {name_of(n + first) for n in range(120) for first in (0, 1000)}
    for source in range(2):
        epochs = [cursor[0] for name, cursor in running.cursors.items() if name.startswith(f"{source}.")]
        assert max(epochs) - min(epochs) <= 1


def test_without_weights_sources_come_by_their_size(numbered, plan_of, run):
    plan = plan_of(numbered("a", 90), numbered("b", 30, first=1000))
    steps = run(plan, (1, 4, 1)).steps(20)
    assert abs(sum(row[0] >= "1000" for step in steps for row in step) - 20) <= 1


def test_conversations_are_streamed_with_their_masks(write, plan_of, tokenizer):
    chats = [{"prompt": f"q{n}", "response": f"r{n}"} for n in range(80)]
    plan = plan_of(write("a.jsonl", *chats), stage="sft", chat_template=str(write("t.jinja", TEMPLATE)), packing=False)
    windows = StreamWindows(
        plan,
        {},
        first_step=0,
        micro_batch_size=4,
        gradient_accumulation_steps=1,
        rank=0,
        data_parallel_size=1,
        convert=lambda batch: batch,
        report=print,
    )
    for _ in range(10):
        for labels in next(windows)[0].labels:
            assert tokenizer.decode(labels[labels != IGNORED]).startswith("r")
    windows.close()


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}|{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}"
)


def test_too_little_data_is_refused_with_the_way_out(numbered, plan_of, run, monkeypatch):
    plan = plan_of(numbered("a", 60))
    monkeypatch.setattr(readers, "CHUNK_RECORDS", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"too little data for a stream in 2 lanes\. Remove data\.streaming"):
        run(plan, (1, 4, 1)).step()


@pytest.mark.parametrize("records", [[{"text": ""}] * 80, [{"text": "four " * 50}] * 80], ids=["empty", "too long"])
def test_a_stream_without_a_single_row_is_refused_instead_of_read_for_ever(write, plan_of, run, records):
    plan = plan_of(write("a.jsonl", *records), overlong="drop")
    with pytest.raises(
        DataError, match=r"a\.jsonl: a lane of the stream has gone through all its records and none gives a row"
    ):
        run(plan, (1, 4, 1)).step()


def test_one_record_among_many_that_give_no_row_is_found(write, plan_of, run):
    plan = plan_of(write("a.jsonl", *[{"text": ""}] * 60, {"text": "here"}, *[{"text": ""}] * 60), batch=1)
    assert run(plan, (1, 1, 1)).steps(6) == [[("here",)]] * 6


BAD = "{not json"


def test_a_bad_record_is_an_error_with_its_line(write, plan_of, run):
    path = write("a.jsonl", *[{"text": name_of(n)} for n in range(50)], BAD, *[{"text": name_of(n)} for n in range(50, 90)])
    running = run(plan_of(path), (1, 4, 1))
    with pytest.raises(DataError, match=rf"a\.jsonl: 1 bad record\. Mend .*\n  {path}:51: not valid JSON"):
        running.steps(60)


def test_bad_records_are_left_out_up_to_the_limit(write, plan_of, run, monkeypatch):
    records = [BAD if n % 10 == 9 else {"text": name_of(n)} for n in range(100)]
    path = write("a.jsonl", *records)
    steps = run(plan_of(path, on_bad_record="skip", max_bad_fraction=0.2), (1, 4, 1)).steps(40)
    fed = {text for step in steps for row in step for text in row}
    assert fed == {name_of(n) for n in range(100) if n % 10 != 9}
    monkeypatch.setattr(prepare, "_EARLY_VERDICT_RECORDS", 50)
    with pytest.raises(DataError, match=r"records read so far, and data\.max_bad_fraction allows 5\.00%"):
        run(plan_of(path, on_bad_record="skip", max_bad_fraction=0.05), (1, 4, 1)).steps(40)


def test_the_position_is_small_however_far_the_stream_is(numbered, plan_of, run):
    plan = plan_of(numbered("a", *[40] * 16), numbered("b", *[40] * 16), batch=16)
    assert plan.lanes == 16
    running = run(plan, (1, 16, 1))
    running.steps(30)
    cursors = running.cursors
    assert len(cursors) == 32
    assert len(json.dumps(cursors, separators=(",", ":"))) <= 2048
    assert all(len(cursor) == 4 for cursor in cursors.values())


def test_what_a_stream_keeps_account_of_does_not_grow_with_its_length(numbered, plan_of, run, monkeypatch):
    tallies = []
    monkeypatch.setattr(stream, "Tally", lambda: tallies.append(prepare.Tally()) or tallies[-1])
    running = run(plan_of(numbered("a", 20, 20, 20, 20)), (1, 4, 1))
    running.steps(100)
    [tally] = tallies
    assert tally.chunks > 100
    assert len(json.dumps(tally.seen("a"))) < 1000


def test_the_same_files_elsewhere_are_the_same_stream(numbered, plan_of, run, tmp_path):
    path = numbered("a", 20, 30, 40)
    plan = plan_of(path)
    here = run(plan, (1, 4, 1)).steps(20)
    os.rename(tmp_path / "a", tmp_path / "moved")
    moved = plan_of(tmp_path / "moved" / "*.jsonl")
    assert moved.fingerprint == plan.fingerprint
    assert run(moved, (1, 4, 1)).steps(20) == here


def test_other_data_or_another_way_to_read_it_is_another_stream(numbered, plan_of, write):
    path = numbered("a", 20, 30)
    plans = [
        plan_of(path),
        plan_of(path, packing=False),
        plan_of(path, overlong="drop"),
        plan_of(path, streaming_buffer=3),
        plan_of(path, batch=1),
        plan_of(path, on_bad_record="skip"),
        plan_of(Source(path=str(path), weight=1.0), Source(path=str(path), weight=2.0)),
    ]
    write("a/0.jsonl", *({"text": name_of(n)} for n in range(21)))
    plans.append(plan_of(path))
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_what_a_stream_cannot_do_is_refused(numbered, plan_of):
    with pytest.raises(DataError, match="a stream has no max_samples"):
        plan_of(Source(path=str(numbered("a", 20)), max_samples=5))


def test_a_lane_count_divides_the_batch_and_depends_on_the_data_alone(numbered, plan_of):
    path = numbered("a", *[10] * 13)
    assert [plan_of(path, batch=batch).lanes for batch in (1, 4, 7, 12, 26, 64)] == [1, 4, 7, 12, 13, 8]


def test_a_stream_that_comes_again_says_so(numbered, plan_of, run):
    running = run(plan_of(numbered("a", 30)), (1, 4, 1))
    running.steps(5)
    assert running.reports == []
    running.steps(30)
    assert running.reports[0].startswith("data: the stream begins epoch 2 at step ")
    assert len(running.reports) == len(set(running.reports)) <= 6
