"""`python -m pwlib bench crf`: its arithmetic, its table and its JSON, on an image small enough to be quick."""

import argparse
import json
import sys

import pytest
import torch

from pwlib.cli.parser import benchmark, main

bench = benchmark()

ARGS = ["bench", "crf", "--sizes", "20x30", "--labels", "3", "--iterations", "2", "--repeats", "1"]


@pytest.mark.slow
def test_writes_rows_and_says_what_it_did_not_measure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda *problem: 1.5)
    assert main([*ARGS, "--json", str(tmp_path / "crf.json")]) == 0
    out = capsys.readouterr().out
    if not torch.cuda.is_available():
        assert "lattice (cuda), exact (cuda): not measured" in out
    result = json.loads((tmp_path / "crf.json").read_text())
    rows = {row["contender"]: row for row in result["rows"]}
    assert {"lattice", "exact"} <= set(rows)
    for row in rows.values():
        assert (row["height"], row["width"], row["labels"], row["iterations"]) == (20, 30, 3, 2)
        assert row["total_ms"] > row["set_up_ms"] > 0
        assert f"{row['total_ms']:.0f}" in out
    assert rows["lattice"]["labels_as_exact"] > 0.5
    assert "labels_as_exact" not in rows["exact"]


@pytest.mark.slow
def test_a_missing_peer_is_named_and_skipped(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    monkeypatch.setattr(bench, "peak_memory", lambda *problem: None)
    assert main([*ARGS, "--peers"]) == 0
    captured = capsys.readouterr()
    assert "pydensecrf2 is not installed and is left out" in captured.err
    assert "pydensecrf2  " not in captured.out


@pytest.mark.parametrize("name", ["lattice", "exact", "pydensecrf2"])
def test_contenders_answer_the_same_question(name):
    if name == "pydensecrf2":
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (pip install '.[bench]')")
    image, logits = bench.problem(24, 32, 4)
    set_up, infer = bench.contenders(1, True)[name](image, logits)
    q = infer(set_up(), 3)
    assert q.shape == (4, 24, 32)
    torch.testing.assert_close(q.sum(0), torch.ones(24, 32))
    torch.testing.assert_close(infer(set_up(), 0), torch.softmax(logits, 1)[0], rtol=1e-4, atol=1e-5)


def test_iterations_are_timed_apart_from_what_surrounds_them(monkeypatch):
    """A contender that takes 20 ms to start, 10 ms an iteration, 5 ms to set up and 3 ms to do so again."""
    clock = [0.0]  # one that only moves when told to: a busy machine must not decide this test

    def sleep(seconds):
        clock[0] += seconds

    def sleeper(image, logits):
        def infer(state, iterations):
            sleep(0.02 + 0.01 * iterations)
            return torch.softmax(logits, 1)[0]

        return (lambda fresh=False: sleep(0.005 if fresh else 0.003)), infer

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "contenders", lambda pixels, peers: {"sleeper": sleeper})
    monkeypatch.setattr(bench, "peak_memory", lambda *problem: None)
    args = argparse.Namespace(repeats=3, iterations=4, peers=False)
    (row,) = bench.measure(8, 8, 2, args, bench.tqdm(disable=True))
    assert row["iteration_ms"] == pytest.approx(10)
    assert row["set_up_ms"] == pytest.approx(5)
    assert row["next_set_up_ms"] == pytest.approx(3)
    assert row["total_ms"] == pytest.approx(65)


@pytest.mark.slow
def test_peak_memory_sees_what_an_inference_allocates():
    small, large = (bench.peak_memory("lattice", side, side, 21, 2) for side in (64, 256))
    if small is None:
        pytest.skip("this system does not report a process's peak memory")
    assert large > 4 * 256 * 256 * 21 / 2**20  # at least the marginals
    assert large > 4 * small


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--sizes", "20"], "is not a size"),
        (["--labels", "0"], "whole number of at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_words(extra, message, capsys):
    with pytest.raises(SystemExit) as error:
        main([*ARGS, *extra])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_nowhere_to_write_is_said_before_measuring(tmp_path, capsys):
    assert main([*ARGS, "--json", str(tmp_path / "none" / "crf.json")]) == 2
    assert "expected the name of a file in an existing folder" in capsys.readouterr().err
