"""Threads that each run operations of their own, in place of all cores at one operation after another.

So what a task works on stays in its core's cache; with all cores at each operation it would change cores, and cores
wait for each other, at every one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Crew:
    """share(count, task) -> [task(0), .., task(count - 1)], shared out among the caller and the crew's threads.

    A task may share out more: who waits for others takes what tasks there are, its own or not. Tasks run in the
    caller's inference mode and are not differentiated. If one fails the others are done first, then it raises.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.tasks: list[Callable[[], None]] = []  # the last ones first: what is nested goes before what is not begun
        self.changed = threading.Condition()

    def __call__(self, count: int, task: Callable[[int], Any]) -> list:
        results: list = [None] * count
        failures: list[BaseException] = []
        unfinished, inference = count, torch.is_inference_mode_enabled()

        def one(turn: int) -> None:
            nonlocal unfinished
            try:
                with torch.inference_mode(inference), torch.no_grad():
                    results[turn] = task(turn)
            except BaseException as failure:
                failures.append(failure)
            with self.changed:
                unfinished -= 1
                self.changed.notify_all()

        with self.changed:
            self.tasks.extend(lambda turn=turn: one(turn) for turn in reversed(range(count)))
            self.changed.notify_all()
        self.work(lambda: unfinished == 0)
        if failures:
            raise failures[0]
        return results

    def work(self, done: Callable[[], bool]) -> None:
        """Do whatever tasks come up, until `done`."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: done() or self.tasks)
                if done():
                    return
                task = self.tasks.pop()
            task()


_here = threading.local()

WORTH = 2**14  # points a thread: with fewer to work on, threads wait for each other longer than they work


@contextlib.contextmanager
def crew(device: torch.device, points: int) -> Iterator[Crew]:
    """On a CPU, up to as many threads as torch uses, as `points` are worth it; elsewhere just this one.

    A crew within a crew is the same one.
    """
    if found := getattr(_here, "crew", None):
        yield found
        return
    if device.type != "cpu":
        yield Crew(1)
        return
    before = torch.get_num_threads()
    threads = max(1, min(before, points // WORTH))
    share, over = Crew(threads), False

    def join() -> None:
        _here.crew = share
        share.work(lambda: over)

    others = [threading.Thread(target=join, daemon=True) for _ in range(threads - 1)]
    torch.set_num_threads(1)  # of this thread, and of those it starts
    try:
        _here.crew = share
        for other in others:
            other.start()
        yield share
    finally:
        _here.crew = None
        with share.changed:
            over = True
            share.changed.notify_all()
        for other in others:
            other.join()
        torch.set_num_threads(before)
