"""What the benchmark scripts compute from their runs, and that what they tell is what they stored."""

import json
import runpy

import numpy as np
import pytest
import torch
from notebook_rules import ROOT
from scipy import stats

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def ablation():
    return runpy.run_path(str(BENCHMARKS / "ablation" / "run.py"))


def test_the_ensemble_averages_probabilities_and_not_logits(ablation):
    logits = torch.randn(2, 1, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    members = [torch.nn.Module() for _ in range(2)]
    for member, answer in zip(members, logits, strict=True):
        member.forward = lambda image, answer=answer: answer
    found = ablation["Ensemble"](*members)(None).exp().numpy()
    e = np.exp(logits.numpy())
    probabilities = e / e.sum(2, keepdims=True)
    np.testing.assert_allclose(found, probabilities.mean(0), atol=1e-12)
    of_logits = np.exp(logits.numpy().mean(0))
    assert np.abs(found - of_logits / of_logits.sum(1, keepdims=True)).max() > 0.01, "the case tells the two apart"


@pytest.mark.parametrize("script", ["ablation", "context"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_are_students(script, count):
    values = np.random.default_rng(count).normal(50, 3, count).tolist()
    interval = runpy.run_path(str(BENCHMARKS / script / "run.py"))["interval"](values)
    low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    mean, half = (float(part) for part in interval.split("±")) if isinstance(interval, str) else interval
    assert abs(mean - np.mean(values)) < 0.06 and abs(half - (high - low) / 2) < 0.06


def test_the_table_of_t_is_students(ablation):
    for count, t in ablation["T_975"].items():
        assert abs(t - stats.t.ppf(0.975, count - 1)) < 6e-4


def test_time_to_target_is_read_off_the_curves():
    target = runpy.run_path(str(BENCHMARKS / "piecewise" / "target.py"))
    rows = [
        {"contender": name, "seconds": [0.0, k * 1.0, k * 2.0, k * 3.0], "miou": [10.0, 20.0, top - 3, top]}
        for k, (name, top) in enumerate(zip(target["CONTENDERS"], [40, 35, 32, 50, 60], strict=True), 1)
    ]
    rows.append({"contender": "piecewise", "seconds": [0.0, 0.5], "miou": [10.0, 33.0]})  # the better rate
    goal, seconds = target["to_target"](rows)
    assert goal == 31  # the lowest of the best, 32, less 1
    assert list(seconds.values()) == [0.5, 4.0, 9.0, 8.0, 10.0]


@pytest.mark.parametrize("folder", ["ablation"])
def test_readme_has_the_tables_of_the_stored_results(folder):
    text = (BENCHMARKS / folder / "README.md").read_text(encoding="utf-8")
    table = runpy.run_path(str(BENCHMARKS / folder / "run.py"))["table"]
    results = sorted((BENCHMARKS / folder).glob("*.json"))
    assert results
    for path in results:
        for line in table(json.loads(path.read_text(encoding="utf-8"))["runs"]).splitlines():
            assert line in text, f"{path.name}: {line!r} is not in README.md"


def test_readmes_have_the_ratios_of_the_stored_runs():
    runs = [json.loads((BENCHMARKS / "crf" / f"reference-{run}.json").read_text())["rows"] for run in range(1, 6)]
    readme = (BENCHMARKS / "crf" / "README.md").read_text(encoding="utf-8")
    columns = {"set-up": "set_up_ms", "set-up, next image": "next_set_up_ms", "one iteration": "iteration_ms"}
    for name, key in (columns | {"total": "total_ms"}).items():
        faster = [f"{theirs[key] / ours[key]:.2f}" for ours, theirs in runs]
        assert f"| {name} | {' | '.join(faster)} |" in readme
    memory = [f"{ours['peak_mb'] / theirs['peak_mb']:.2f}" for ours, theirs in runs]
    assert f"| peak memory, times the peer's | {' | '.join(memory)} |" in readme
    for row, name in zip(runs[3], ("`pwlib`, lattice", "pydensecrf2"), strict=True):  # the run that is shown
        times = f"{row['set_up_ms']:.0f} ms | {row['next_set_up_ms']:.0f} ms | {row['iteration_ms']:.2g} ms"
        line = f"{times} | {row['total_ms'] / 1000:.2f} s | {row['peak_mb']:.0f} MB |"
        for text in (readme, (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")):
            assert any(shown.startswith(f"| {name}") and shown.endswith(line) for shown in text.splitlines()), line
    assert all(ours["labels_as_pydensecrf2"] == 1 and ours["mean_difference_to_pydensecrf2"] < 1e-7 for ours, _ in runs)
