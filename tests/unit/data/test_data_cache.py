import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from ds_trainer.data import cache
from ds_trainer.data.cache import build_once, describe_file, fingerprint, open_rows, open_tokens, write_rows, write_tokens
from ds_trainer.data.pack import Rows, Segments
from ds_trainer.data.tokenize import Document
from ds_trainer.errors import DataError

FORK = multiprocessing.get_context("fork")
DOCUMENTS = [Document([5, 6, 7], [(1, 2), (2, 3)]), Document([], []), Document([65535], [(0, 1)])]


def build_numbers(folder):
    (folder / "numbers.bin").write_bytes(bytes(100))
    return {"count": 100}


def never(folder):
    raise AssertionError("must not be built")


def build(folder, build=build_numbers, report=lambda line: None):
    return build_once(folder, build, what="numbers", report=report)


def in_processes(count, target, *arguments):
    processes = [FORK.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def join(processes):
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0


def test_a_whole_folder_is_built_once(tmp_path):
    meta = build(tmp_path / "deep" / "numbers")
    assert meta == {"count": 100, "files": {"numbers.bin": 100}}
    assert build(tmp_path / "deep" / "numbers", never) == meta
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["numbers", "numbers.lock"]


def _build_slowly(folder, log):
    def slow(target):
        time.sleep(0.3)
        log.put("built")
        return build_numbers(target)

    meta = build_once(folder, slow, what="numbers", report=log.put)
    log.put(f"read {meta['count']}")


def test_of_four_processes_one_builds_and_the_others_wait(tmp_path):
    log = FORK.Queue()
    join(in_processes(4, _build_slowly, tmp_path / "numbers", log))
    lines = [log.get(timeout=5) for _ in range(8)]
    assert lines.count("built") == 1
    assert lines.count("read 100") == 4
    waiting = [line for line in lines if line.startswith("waiting for another process that builds the numbers")]
    assert len(waiting) == 3


def _build_for_ever(folder, started):
    def hang(target):
        (target / "numbers.bin").write_bytes(bytes(50))
        started.set()
        time.sleep(60)

    build_once(folder, hang, what="numbers", report=print)


def test_a_killed_builder_leaves_nothing_that_is_read_and_no_lock(tmp_path):
    started = FORK.Event()
    [builder] = in_processes(1, _build_for_ever, tmp_path / "numbers", started)
    assert started.wait(timeout=30)
    [waiter] = in_processes(1, build, tmp_path / "numbers")
    assert not (tmp_path / "numbers").exists()
    os.kill(builder.pid, signal.SIGKILL)
    builder.join(timeout=30)
    join([waiter])
    assert build(tmp_path / "numbers", never)["count"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "numbers.lock"]


def _fail_slowly(folder, attempts, refusals):
    def fail(target):
        attempts.put("attempt")
        time.sleep(0.5)
        raise DataError("a.jsonl:3: bad")

    try:
        build_once(folder, fail, what="numbers", report=print)
    except DataError as error:
        refusals.put(str(error))


def test_those_who_wait_fail_with_the_builder_instead_of_after_it(tmp_path):
    attempts, refusals = FORK.Queue(), FORK.Queue()
    join(in_processes(4, _fail_slowly, tmp_path / "numbers", attempts, refusals))
    assert [refusals.get(timeout=5) for _ in range(4)] == ["a.jsonl:3: bad"] * 4
    assert attempts.get(timeout=5) == "attempt"
    assert attempts.empty()
    assert build(tmp_path / "numbers")["count"] == 100  # the next start tries again


def cut_short(folder):
    os.truncate(folder / "numbers.bin", 60)


def remove_file(folder):
    (folder / "numbers.bin").unlink()


def remove_meta(folder):
    (folder / "meta.json").unlink()


def halve_meta(folder):
    os.truncate(folder / "meta.json", 20)


def foreign_meta(folder):
    (folder / "meta.json").write_text("[]")


@pytest.mark.parametrize("damage", [cut_short, remove_file, remove_meta, halve_meta, foreign_meta])
def test_a_damaged_folder_is_built_again_and_said(tmp_path, reports, damage):
    folder = tmp_path / "numbers"
    build(folder)
    damage(folder)
    assert build(folder, report=reports.append)["count"] == 100
    [line] = reports
    assert line.startswith(f"{folder}: damaged (")
    assert line.endswith("built again")
    assert (folder / "numbers.bin").stat().st_size == 100


def test_a_failed_build_leaves_no_folder(tmp_path):
    def interrupted(folder):
        (folder / "numbers.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "numbers", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.lock"]


def test_a_place_that_cannot_be_written_is_an_error_with_the_setting_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*the cache of numbers cannot be written: .* Set data.cache_folder"):
        build(tmp_path / "file" / "numbers")


def test_documents_are_read_back_as_written(tmp_path):
    counts = write_tokens(tmp_path, DOCUMENTS, "uint16")
    assert counts == {"documents": 3, "tokens": 4, "trained_tokens": 3, "max_token_id": 65535}
    tokens = open_tokens(tmp_path, "uint16")
    assert tokens.tokens.tolist() == [5, 6, 7, 65535]
    assert tokens.offsets.tolist() == [0, 3, 3, 4]
    assert tokens.spans.tolist() == [[1, 2], [2, 3], [0, 1]]
    assert tokens.span_offsets.tolist() == [0, 2, 2, 3]
    assert (tmp_path / "tokens.bin").stat().st_size == 2 * 4
    assert np.load(tmp_path / "spans.npy").dtype == np.int64


def test_nothing_at_all_can_be_written_and_read(tmp_path):
    assert write_tokens(tmp_path, [], "uint32")["max_token_id"] == -1
    tokens = open_tokens(tmp_path, "uint32")
    assert (tokens.tokens.tolist(), tokens.offsets.tolist(), tokens.spans.shape) == ([], [0], (0, 2))


def test_an_id_that_does_not_fit_is_never_wrapped(tmp_path):
    with pytest.raises(OverflowError):
        write_tokens(tmp_path, [Document([65536], [])], "uint16")


def test_rows_are_read_back_as_written(tmp_path):
    rows = Rows(np.array([0, 2, 3]), Segments(np.array([0, 1, 2]), np.array([0, 0, 4]), np.array([3, 2, 4])))
    write_rows(tmp_path, rows)
    read = open_rows(tmp_path)
    assert read.num_rows == 2
    assert read.offsets.tolist() == [0, 2, 3]
    assert read.segments.start.tolist() == [0, 0, 4]


def test_a_fingerprint_depends_on_content_not_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_file_is_known_by_its_content_and_a_large_one_also_by_its_time(write, monkeypatch):
    path = write("a.jsonl", raw=b"x" * 1000)
    before = describe_file(path)["sha256"]
    os.utime(path, ns=(1, 1))
    assert describe_file(path)["sha256"] == before
    path.write_bytes(b"x" * 999 + b"y")
    assert describe_file(path)["sha256"] != before

    monkeypatch.setattr(cache, "HASHED_WHOLE_BYTES", 10)
    monkeypatch.setattr(cache, "_SAMPLE_BYTES", 10)
    sampled = describe_file(path)["sha256"]
    assert describe_file(path)["sha256"] == sampled
    os.utime(path, ns=(1, 1))
    assert describe_file(path)["sha256"] != sampled
    os.utime(path, ns=(1, 2))
    at_1_2 = describe_file(path)["sha256"]
    path.write_bytes(b"x" * 999 + b"z")
    os.utime(path, ns=(1, 2))
    assert describe_file(path)["sha256"] != at_1_2  # the last block is among those that are hashed
