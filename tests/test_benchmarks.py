"""The statistics that the benchmark scripts compute from their runs."""

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


def test_the_ensemble_averages_probabilities(ablation):
    logits = torch.randn(2, 1, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    members = [torch.nn.Module() for _ in range(2)]
    for member, answer in zip(members, logits, strict=True):
        member.forward = lambda image, answer=answer: answer
    found = ablation["Ensemble"](*members)(None).exp().numpy()
    e = np.exp(logits.numpy())
    probabilities = e / e.sum(2, keepdims=True)
    np.testing.assert_allclose(found, probabilities.mean(0), atol=1e-12)
    of_logits = np.exp(logits.numpy().mean(0))
    assert np.abs(found - of_logits / of_logits.sum(1, keepdims=True)).max() > 0.01, (
        "averaging logits gives something else"
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_agree_with_scipy(ablation, count):
    values = np.random.default_rng(count).normal(50, 3, count).tolist()
    mean, half = ablation["interval"](values)
    low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    assert abs(mean - np.mean(values)) < 0.06 and abs(half - (high - low) / 2) < 0.06


def test_quantiles_of_t_agree_with_scipy(ablation):
    for count, t in ablation["T_975"].items():
        assert abs(t - stats.t.ppf(0.975, count - 1)) < 6e-4


def test_a_study_is_continued_and_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study import T_975, Study, mean_and_half

    for count, t in T_975.items():
        assert abs(t - stats.t.ppf(0.975, count - 1)) < 6e-4
    values = [50.0, 53.0, 49.0, 51.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(mean_and_half(values), (np.mean(values), (high - low) / 2), rtol=1e-3)
    path = tmp_path / "new" / "result.json"
    one, other = Study(path, {"sizes": (1, 2)}), Study(path, {"sizes": (1, 2)})
    one.add("a", {"miou": 1}, command="x")
    other.add("b", {"miou": 2}, command="x")  # a second process
    assert {name: row["miou"] for name, row in Study(path, {"sizes": [1, 2]}).runs.items()} == {"a": 1, "b": 2}
    with pytest.raises(SystemExit, match="other settings"):
        Study(path, {"sizes": [3]})


def test_time_to_target():
    target = runpy.run_path(str(BENCHMARKS / "piecewise" / "target.py"))
    rows = [
        {"contender": name, "seconds": [0.0, k * 1.0, k * 2.0, k * 3.0], "miou": [10.0, 20.0, top - 3, top]}
        for k, (name, top) in enumerate(zip(target["CONTENDERS"], [40, 35, 32, 50, 60], strict=True), 1)
    ]
    rows.append({"contender": "piecewise", "seconds": [0.0, 0.5], "miou": [10.0, 33.0]})  # the better learning rate
    goal, seconds = target["to_target"](rows)
    assert goal == 31  # the lowest of the best scores, 32, minus 1
    assert list(seconds.values()) == [0.5, 4.0, 9.0, 8.0, 10.0]


def test_the_table_of_the_number_of_images():
    images = runpy.run_path(str(BENCHMARKS / "backbone" / "images.py"))
    part = {"unary": {"miou": 10.0}, "crf": {"miou": 12.0}}
    runs = [
        {"network": "scratch", "images": 20, "seed": seed, "cpu_minutes": 1.0 + seed, "scores": {"val": part}}
        for seed in (0, 1)
    ]
    for run, miou in zip(runs, (20.0, 31.0), strict=True):
        run["scores"] = {"val": part, "unseen drive": {"unary": {"miou": miou}, "crf": {"miou": miou + 1}}}
    cells = images["table"](runs).splitlines()[-1].split(" | ")
    assert cells[1:4] == ["20", "2", "1.5"]
    assert cells[4:] == ["10.0 (10.0 to 10.0)", "12.0 (12.0 to 12.0)", "25.5 (20.0 to 31.0)", "26.5 (21.0 to 32.0) |"]
    assert images["table"](runs[:1]).splitlines()[-1].endswith("| 10.0 | 12.0 | 20.0 | 21.0 |")
