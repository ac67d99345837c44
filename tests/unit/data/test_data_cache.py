import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

from ds_trainer.data import cache
from ds_trainer.data import lease as lease_module
from ds_trainer.data.cache import build_once, describe_file, describe_files, fingerprint
from ds_trainer.errors import DataError

FORK = multiprocessing.get_context("fork")


def build_numbers(folder, lease):
    (folder / "numbers.bin").write_bytes(bytes(100))
    return {"count": 100}


def never(folder, lease):
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
    def slow(target, lease):
        time.sleep(0.3)
        log.put("built")
        return build_numbers(target, lease)

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
    def hang(target, lease):
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
    def fail(target, lease):
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


def test_a_failed_build_leaves_nothing_but_the_lock(tmp_path):
    def fail(folder, lease):
        (folder / "numbers.bin").write_bytes(b"half")
        raise DataError("a.jsonl:3: bad")

    with pytest.raises(DataError, match=r"a\.jsonl:3: bad"):
        build(tmp_path / "numbers", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.lock"]


def test_what_an_interrupted_build_has_written_is_handed_to_the_next_one_and_is_not_read(tmp_path):
    def interrupted(folder, lease):
        (folder / "numbers.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    def go_on(folder, lease):
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("numbers.bin", b"half")]
        return build_numbers(folder, lease)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "numbers", interrupted)
    assert not (tmp_path / "numbers").exists()
    assert build(tmp_path / "numbers", go_on)["count"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "numbers.lock"]


def test_a_place_that_cannot_be_written_is_an_error_with_the_setting_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*the cache of numbers cannot be written: .* Set data.cache_folder"):
        build(tmp_path / "file" / "numbers")


def test_four_processes_that_start_again_and_again_build_once(tmp_path):
    log, rounds = FORK.Queue(), 3

    def start():
        for _ in range(rounds):
            build_once(tmp_path / "deep" / "numbers", counted, what="numbers", report=lambda line: None)
            log.put("read")

    def counted(folder, lease):
        log.put("built")
        time.sleep(0.05)
        return build_numbers(folder, lease)

    join(in_processes(4, start))
    lines = [log.get(timeout=5) for _ in range(4 * rounds + 1)]
    assert (lines.count("built"), lines.count("read")) == (1, 4 * rounds)
    assert log.empty()


def be_host(name):
    """Be a host of its own: the kernel's locks of a shared disk are kept to each host."""
    socket.gethostname = lambda: name
    fcntl.flock = lambda file, how: None


@pytest.mark.parametrize("first", ["a", "b"])
def test_two_hosts_that_build_at_once_both_end_with_the_same_whole_folder(tmp_path, first):
    """As after a beat that came too late: host b takes over, and host a has been alive all the time."""
    folder, begun, results = tmp_path / "numbers", {name: FORK.Event() for name in "ab"}, FORK.Queue()

    def host(name):
        be_host(name)

        def slowly(target, lease):
            (target / "numbers.bin").write_bytes(bytes(50))
            begun[name].set()
            assert begun["ab".replace(name, "")].wait(20)
            if name != first:
                for _ in range(200):  # until the other has published, which may remove this one's files
                    if folder.exists():
                        break
                    time.sleep(0.02)
            return build_numbers(target, lease)

        lease_module.DEAD_SECONDS = 0.05  # the first beat comes later
        results.put(build_once(folder, slowly, what="numbers", report=lambda line: None))

    join(in_processes(1, host, "a") + in_processes(1, host, "b"))
    whole = {"count": 100, "files": {"numbers.bin": 100}}
    assert [results.get(timeout=5) for _ in range(2)] == [whole, whole]
    assert build(folder, never) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "numbers.lock"]


def test_what_a_killed_builder_on_another_host_left_is_removed(tmp_path):
    left = tmp_path / ".numbers.building.other-host"
    left.mkdir()
    (left / "numbers.bin").write_bytes(bytes(70))
    assert build(tmp_path / "numbers")["count"] == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers", "numbers.lock"]


def test_a_full_disk_is_an_error_with_the_setting_to_change_and_leaves_nothing(tmp_path):
    refusals = FORK.Queue()

    def start():
        import resource

        def large(folder, lease):
            (folder / "numbers.bin").write_bytes(bytes(10_000))
            return {}

        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            build_once(tmp_path / "numbers", large, what="numbers", report=print)
        except DataError as error:
            refusals.put(str(error))

    join(in_processes(1, start))
    assert "the cache of numbers cannot be written: File too large. Set data.cache_folder" in refusals.get(timeout=5)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.lock"]
    assert build(tmp_path / "numbers")["count"] == 100


def test_a_whole_folder_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    build(tmp_path / "numbers")

    def refuse(*arguments, **named):
        raise OSError(30, "Read-only file system")

    for name in ("open", "mkdir", "unlink", "rename"):
        monkeypatch.setattr(os, name, refuse)
    assert build(tmp_path / "numbers", never)["count"] == 100


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


def settle(path, seconds=100):
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_file_is_hashed_again_only_when_it_has_changed(write, tmp_path, monkeypatch):
    hashed = []

    def counted(path):
        hashed.append(path.name)
        return describe_file(path)

    monkeypatch.setattr(cache, "describe_file", counted)
    files, memory = [write("a.jsonl", "1"), write("b.jsonl", "2")], tmp_path / "cache" / "files.json"
    for path in files:
        settle(path)
    first = describe_files(files, memory)
    assert hashed == ["a.jsonl", "b.jsonl"]
    assert first == [describe_file(path) for path in files]
    assert describe_files(files, memory) == first
    assert hashed == ["a.jsonl", "b.jsonl"]

    settle(write("b.jsonl", "3"), 50)  # as long as before
    second = describe_files(files, memory)
    assert hashed == ["a.jsonl", "b.jsonl", "b.jsonl"]
    assert second[0] == first[0]
    assert second[1]["sha256"] == describe_file(files[1])["sha256"] != first[1]["sha256"]
    assert list(memory.parent.iterdir()) == [memory]


def test_a_file_that_was_changed_just_now_is_not_remembered(write, tmp_path):
    path, memory = write("a.jsonl", "1"), tmp_path / "files.json"
    status = path.stat()
    before = describe_files([path], memory)[0]["sha256"]
    write("a.jsonl", "2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # within one tick of the clock of the disk
    assert describe_files([path], memory)[0]["sha256"] != before


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"{", b'"x"'])
def test_a_damaged_memory_is_forgotten(write, tmp_path, content):
    path, memory = write("a.jsonl", "1"), write("files.json", raw=content)
    settle(path)
    assert describe_files([path], memory) == [describe_file(path)]
    assert len(json.loads(memory.read_text())) == 1


def test_a_memory_that_cannot_be_written_does_not_matter(write, tmp_path):
    path, memory = write("a.jsonl", "1"), write("taken", "") / "files.json"
    settle(path)
    assert describe_files([path], memory) == [describe_file(path)]


def test_a_file_that_is_gone_is_an_error_with_its_path(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        describe_files([tmp_path / "gone.jsonl"], tmp_path / "files.json")
