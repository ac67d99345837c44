import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ds_trainer.data.chunks import Chunk
from ds_trainer.data.tokenize import ChunkTokenizer, make_recipe
from ds_trainer.data.workers import TokenizerPool, tokenize_in_order
from ds_trainer.errors import DataError


def make_chunks(count):
    texts = ("".join(json.dumps({"text": "four " * (1 + (n + k) % 50)}) + "\n" for k in range(3)) for n in range(count))
    return [Chunk(f"{n}.jsonl", 1, text.encode()) for n, text in enumerate(texts)]


@pytest.fixture
def recipe(tokenizer):
    return make_recipe(tokenizer, format="text", fields={}, stage="pretrain", template=None)


def children():
    return {each.pid for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE}


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(autouse=True)
def leaves_no_process():
    before = children()
    yield
    end = time.monotonic() + 5
    while (left := workers_of(children() - before)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == set()


def workers_of(pids):
    """Without multiprocessing's own resource tracker, which stays."""
    return {pid for pid in pids if "resource_tracker" not in " ".join(psutil.Process(pid).cmdline())}


def as_lists(chunk):
    return chunk.tokens.tolist(), chunk.lengths.tolist(), chunk.lines.tolist(), chunk.read


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_results_come_in_order_and_are_those_of_one_process(recipe, count):
    chunks = make_chunks(count)
    done = list(tokenize_in_order(iter(chunks), recipe, workers=2, timeout_seconds=60))
    assert [chunk for chunk, _ in done] == chunks
    alone = ChunkTokenizer(recipe)
    assert [as_lists(tokens) for _, tokens in done] == [as_lists(alone(chunk)) for chunk in chunks]


def test_chunks_are_read_only_when_a_worker_will_soon_be_free(recipe):
    taken = []

    def reader():
        for chunk in make_chunks(100):
            taken.append(chunk)
            yield chunk

    results = tokenize_in_order(reader(), recipe, workers=2, timeout_seconds=60)
    next(results)
    assert len(taken) <= 9
    results.close()


def test_one_source_is_not_tokenised_by_the_recipe_of_another(recipe, make_tokenizer):
    other = make_recipe(make_tokenizer(eos_token="<|im_end|>"), format="text", fields={}, stage="pretrain", template=None)
    [chunk] = make_chunks(1)
    pool = TokenizerPool([recipe, other], workers=0, timeout_seconds=60)
    ends = [pool.submit(chunk, source)().tokens[-1] for source in (0, 1)]
    assert ends == [recipe.eos, other.eos]
    pool.close()


def started(recipe, workers=1):
    """A pool whose workers have loaded all they need."""
    pool = TokenizerPool([recipe], workers=workers, timeout_seconds=60)
    before = children()
    chunks = make_chunks(workers)
    for result in [pool.submit(chunk) for chunk in chunks]:
        result()
    pids = {worker.pid for worker in pool._workers()}
    assert pids <= children()
    assert len(pids - before) >= 1
    return pool, sorted(pids)


@pytest.mark.parametrize("noticed", [True, False])
def test_a_killed_worker_is_an_error_that_names_what_was_tokenised(recipe, noticed):
    pool, [pid] = started(recipe)
    os.kill(pid, signal.SIGKILL)
    if noticed:
        end = time.monotonic() + 10
        while not pool._executor._broken and time.monotonic() < end:
            time.sleep(0.01)
    with pytest.raises(DataError, match=r"a tokenising process was killed while 0\.jsonl, from line 1 on was tokenised"):
        pool.submit(make_chunks(1)[0])()
    pool.close()
    assert is_gone(pid)


def test_a_stopped_worker_is_an_error_that_names_it_and_it_does_not_stay(recipe):
    pool, [pid] = started(recipe)
    os.kill(pid, signal.SIGSTOP)
    pool._timeout = 2
    result, begun = pool.submit(make_chunks(1)[0]), time.monotonic()
    what = rf"did not answer for 2 s \(data\.timeout_seconds\) while 0\.jsonl, .* The processes: {pid} \(stopped\)\."
    with pytest.raises(DataError, match=what):
        result()
    pool.close()
    assert time.monotonic() - begun < 6
    assert is_gone(pid)


def test_a_pool_ends_its_own_workers_and_no_others(recipe):
    first, [_] = started(recipe)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    second, [pid] = started(recipe)
    first.close()
    assert not is_gone(pid)
    assert second.submit(make_chunks(1)[0])().read == 3
    second.close()
    assert other.poll() is None
    other.kill()
    other.wait()


PARENT = """
import json, os, signal, sys
from ds_trainer.data.chunks import Chunk
from ds_trainer.data.tokenize import Recipe
from ds_trainer.data.workers import TokenizerPool

if __name__ == "__main__":
    pool = TokenizerPool([Recipe(**json.loads(sys.stdin.read()))], workers=1, timeout_seconds=60)
    pool.submit(Chunk("a.jsonl", 1, b'{"text": "four"}\\n'))()
    print(" ".join(str(worker.pid) for worker in pool._workers()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_was_killed(recipe, tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    parts = {name: getattr(recipe, name) for name in recipe.__slots__}
    done = subprocess.run([sys.executable, str(program)], input=json.dumps(parts), capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [pid] = map(int, done.stdout.split())
    end = time.monotonic() + 5
    while not is_gone(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert is_gone(pid)
