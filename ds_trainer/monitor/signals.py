"""Be asked to end: by a signal, by a limit of time, or by a launcher that is gone.

While the loop trains, the first request only raises a flag that the ranks compare at each step's end. All else happens at once,
also where the main thread waits inside a library and Python's own handlers do not run.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence

from ds_trainer.monitor.parents import Parents, parent_of

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
TIME_IS_UP = 100
LAUNCHER_GONE = 101
RANK_GONE = 102
"""Reasons that are no signal; above all of theirs, since the ranks agree on the largest."""

SAME_SECONDS = 2.0
"""So long a further signal belongs to the first: Ctrl-C reaches a rank from the terminal and, a moment later, its launcher."""
LEAVING_SECONDS = 10.0
"""So long after the end of a run signals are passed over: a launcher sends one to the other ranks when the first has left."""
ORPHAN_SECONDS = 30.0
"""What a rank whose launcher is gone has to come to a step's end; what torchrun grants its workers."""
_POLL_SECONDS = 1.0


class StopRequests:
    """Whether this process is asked to end. `watch` is called from the main thread, before the others."""

    def __init__(
        self,
        *,
        end: Callable[[int], None],
        say: Callable[[str], None],
        a_rank_failed: Callable[[], bool],
        parents: Parents,
        deadline: float | None = None,
    ) -> None:
        """Take what to do.

        Args:
            end: leaves the process at once; called in a thread of its own with a signal's number, LAUNCHER_GONE, or RANK_GONE
                when a rank has ended without a word.
            say: takes a line for the user.
            a_rank_failed: whether another rank has said that it failed: then no step of this one will end.
            parents: the launcher.
            deadline: the end of the run's time, by `time.monotonic`.
        """
        self._end = end
        self._say = say
        self._a_rank_failed = a_rank_failed
        self._parents = parents
        self._deadline = deadline
        self._peers: Sequence[int] = ()
        self._asked = 0
        self._met_one = False
        self._training = False
        self._deaf_until = 0.0
        self._orphan = False
        self._orphan_until = float("inf")

    @property
    def training(self) -> bool:
        """Whether the loop asks for requests."""
        return self._training

    def watch(self) -> None:
        """Take signals from now on, and look after the launcher."""
        # Python runs a handler between two steps of the main thread, which may be waiting for a GPU or for a rank that is gone.
        # The byte that the interpreter writes into a pipe for each signal comes at once.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for each in ENDING:
            if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:  # nohup
                signal.signal(each, lambda number, frame: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)  # the pipe is the parent's
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()

    def begin(self, peers: Sequence[int] = ()) -> None:
        """From now on the loop calls `asked`: the first request waits for it.

        Args:
            peers: the processes of the ranks on this host. A step that one of them is missing from does not end.
        """
        self._peers = peers
        self._training = True

    def asked(self) -> int:
        """Why this rank would end now: a signal's number, TIME_IS_UP or LAUNCHER_GONE; 0 when it would not."""
        if not self._asked and self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_IS_UP
        return self._asked

    def agreed(self, reason: int) -> None:
        """All ranks end for this reason, which may be another rank's. The work on a step is over, saving comes now."""
        if not self._met_one:
            self._deaf_until = time.monotonic() + SAME_SECONDS
            self._say(f"{in_words(reason)}: ending after this step")
        self._asked, self._orphan_until = reason, float("inf")

    def over(self) -> None:
        """The run has ended and is saved: what comes now would only cut its last words short; later it ends at once again."""
        self._deaf_until = time.monotonic() + LEAVING_SECONDS
        self._training = False

    def _watch(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], _POLL_SECONDS)[0]:
                # Of signals that were pending together the kernel runs the last one's handler first: Ctrl-C before the
                # SIGTERM that a launcher made of it.
                for number in sorted(os.read(reader, 64)):
                    if number in ENDING:
                        self._take(number, in_words(number))
            self._look_around()

    def _look_around(self) -> None:
        now = time.monotonic()
        if not self._orphan and (gone := self._parents.gone()):
            self._orphan, self._orphan_until = True, now + ORPHAN_SECONDS
            if not self._asked:
                self._take(LAUNCHER_GONE, gone)
        if now > self._orphan_until:
            self._end(LAUNCHER_GONE)
        if self._asked and self._training and now > self._deaf_until:
            self._end_with_the_others()

    def _take(self, reason: int, words: str) -> None:
        now = time.monotonic()
        if now < self._deaf_until:
            return
        if self._met_one or not self._training:
            self._end(reason)
        self._end_with_the_others()
        self._met_one, self._deaf_until = True, now + SAME_SECONDS
        self._asked = self._asked or reason
        self._say(f"{words}: saving after this step, then ending; a second signal ends at once")

    def _end_with_the_others(self) -> None:
        # A launcher ends the other ranks with a signal when one has failed. No step ends then: a GPU waits for the missing one.
        if self._a_rank_failed():
            self._end(signal.SIGTERM)
        if any(parent_of(peer) is None for peer in self._peers):
            self._end(RANK_GONE)


def in_words(reason: int) -> str:
    """A reason to end: the signal's name, or a sentence."""
    if reason == LAUNCHER_GONE:
        return "the end of its launcher"
    if reason == TIME_IS_UP:
        return "train.max_seconds is over"
    return signal.Signals(reason).name + (" (Ctrl-C)" if reason == signal.SIGINT else "")


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    for each in ENDING:
        if signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, signal.SIG_DFL)
