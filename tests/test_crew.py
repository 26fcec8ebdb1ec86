"""Tasks shared out among threads: all done once, in their places, whoever waits for whom."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from pwlib.crew import WORTH, crew

CPU, MANY = torch.device("cpu"), 2**20


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param, "the crew kept torch's threads"
    torch.set_num_threads(before)


def test_results_stand_in_the_order_of_their_tasks_and_each_task_has_one_core(threads):
    with crew(CPU, MANY) as share, crew(CPU, MANY) as within:
        assert share(7, lambda turn: turn**2) == [turn**2 for turn in range(7)]
        assert share(0, lambda turn: turn) == []
        assert share is within or threads == 1
        assert set(share(9, lambda _: torch.get_num_threads())) == {1}


def test_few_points_are_work_for_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for points, threads in ((1, 1), (WORTH, 1), (3 * WORTH, 3), (100 * WORTH, 4)):
            with crew(CPU, points) as share:
                assert share.threads == threads and torch.get_num_threads() == 1
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_threads_work_at_the_same_time():
    together = threading.Barrier(2, timeout=20)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with crew(CPU, MANY) as share:
            assert len(set(share(2, lambda _: (together.wait(), threading.get_ident())[1]))) == 2
    finally:
        torch.set_num_threads(before)


def test_a_failure_comes_out_after_the_other_tasks_are_done(threads):
    done = []
    with pytest.raises(ZeroDivisionError), crew(CPU, MANY) as share:
        share(5, lambda turn: done.append(1 / (turn - 3)))
    assert len(done) == 4


def test_tasks_share_out_tasks_of_their_own(threads):
    """More of them wait than there are threads: whoever waits has to work."""
    with crew(CPU, MANY) as share:
        inner = share(6, lambda i: sum(share(5, lambda j: sum(share(3, lambda k: 100 * i + 10 * j + k)))))
    assert inner == [sum(100 * i + 10 * j + k for j in range(5) for k in range(3)) for i in range(6)]


def test_a_failure_within_a_task_is_that_tasks(threads):
    with crew(CPU, MANY) as share:

        def outer(turn):
            try:
                return share(3, lambda inner: 1 / (inner + turn - 2))
            except ZeroDivisionError:
                return None

        assert share(4, outer) == [None, None, None, [1.0, 0.5, 1 / 3]]


@pytest.mark.parametrize("inference", [True, False])
def test_tasks_run_in_their_callers_mode_and_without_a_gradient(threads, inference):
    with torch.inference_mode(not inference), crew(CPU, MANY) as share, torch.inference_mode(inference):
        found = share(8, lambda _: (torch.ones(1).is_inference(), torch.is_grad_enabled()))
    assert set(found) == {(inference, False)}


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_openmp_s_threads_wait_asleep_unless_told_otherwise(given, expected):
    """What OpenMP says of itself once torch has loaded it."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | {"OMP_DISPLAY_ENV": "true"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run([sys.executable, "-c", "import pwlib"], env=env, capture_output=True, text=True, check=True)
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this OpenMP does not say how its threads wait")
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
