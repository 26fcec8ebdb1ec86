"""The statistics that the benchmark scripts compute from their runs."""

import itertools
import runpy
import sys

import numpy as np
import pytest
import torch
from notebook_rules import ROOT
from scipy import stats

from pwlib.data import SegmentationDataset, voc_palette

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


def test_the_ablation_reports_the_differences_that_a_paired_t_test_finds(ablation):
    draw = np.random.default_rng(3)
    outputs = {*ablation["RUNGS"].values(), *ablation["DETAILS"].values()}
    runs = {f"seed {seed}": {network: {"parameters": 10} for network, _ in outputs} for seed in range(5)}
    for (network, part), row in itertools.product(outputs, runs.values()):
        row[network][part] = dict(zip(("miou", "pixel_accuracy", "boundary_iou"), draw.normal(50, 2, 3), strict=True))
    runs["seed 0"]["context"]["unary"]["miou"] += 40  # one seed does not make an interval
    for row in runs.values():
        row["ensemble"]["crf"]["miou"] += 15  # all five do
    found = {}
    for line in ablation["table"]({"Scenes": runs}).splitlines():
        name, *cells = line.strip("| ").split(" | ")
        found[name] = cells
    rows = ablation["RUNGS"] | ablation["DETAILS"]
    decisions = []
    for (one, other), what in ablation["STEPS"].items():
        pair = [[row[network][part]["miou"] for row in runs.values()] for network, part in (rows[one], rows[other])]
        text = found[f"{ablation['WORDS'][one][0]} - {ablation['WORDS'][other][0]}: {what}"][0]
        none = text.startswith("no difference found (")
        assert none == (stats.ttest_rel(*pair).pvalue >= 0.05)
        assert f"{np.mean(pair[0]) - np.mean(pair[1]):+.1f} ± " in text
        decisions.append(none)
    assert True in decisions and False in decisions


def test_a_study_is_continued_and_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from study import T_975, Study, mean_and_half

    for count, t in T_975.items():
        assert abs(t - stats.t.ppf(0.975, count - 1)) < 6e-4
    values = [50.0, 53.0, 49.0, 51.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(mean_and_half(values), (np.mean(values), (high - low) / 2), rtol=1e-3)
    path = tmp_path / "new" / "result.json"
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "some" / "run.py"), "--seeds", "0"])
    one, other = Study(path, {"sizes": (1, 2)}), Study(path, {"sizes": (1, 2)})
    one.add("a", {"miou": 1})
    other.add("b", {"miou": 2})  # a second process
    assert {name: row["miou"] for name, row in Study(path, {"sizes": [1, 2]}).runs.items()} == {"a": 1, "b": 2}
    with pytest.raises(SystemExit, match="other settings"):
        Study(path, {"sizes": [3]})
    with pytest.raises(ArithmeticError):
        one.measure("c", lambda: {"miou": 1 / 0})
    for score in (3, 4):  # the second one is not run
        one.measure("c", lambda score=score: {"miou": score})
    assert {name: row["miou"] for name, row in one.runs.items()} == {"a": 1, "b": 2, "c": 3}
    assert one.runs["c"]["minutes"] >= 0
    assert one.runs["c"]["command"] == "python benchmarks/some/run.py --seeds 0"
    monkeypatch.setattr(sys, "argv", ["/elsewhere/other.py"])
    assert Study(path, {"sizes": [1, 2]}).about["command"] == "python other.py"


def test_the_tables_of_stage_2_and_of_the_pretrained_context(drives):
    """Differences of seed 0 and 1, by hand; the context takes the weight with the best score on held-out frames."""
    score = {"network": 30.0, "default": 31.0, "learned, quick": 33.0, "learned, long": 28.0}
    rows = [
        {"drive": "0001TP", "scores": {"left out": {n: {"miou": v + k, "pixel_accuracy": v} for n, v in score.items()}}}
        for k in (0, 1)
    ]
    stage2 = runpy.run_path(str(BENCHMARKS / "drives" / "stage2.py"))
    line = stage2["table"](dict(enumerate(rows))).splitlines()[2]
    assert line.startswith("| 0001TP | 2 | 30.5 ± 6.4 | +1.0 ± 0.0 | +3.0 ± 0.0 | -2.0 ± 0.0 | -5.0 ± 0.0 |  |")
    pretrained = runpy.run_path(str(BENCHMARKS / "context" / "pretrained.py"))
    names = ["network", *(f"{c}, {w:g}" for c in pretrained["COUNTINGS"] for w in pretrained["WEIGHTS"])]
    held = {name: {dense: {"miou": 50.0} for dense in ("none", "default")} for name in names}
    held["tree, 0.25"]["none"]["miou"] = 51.0
    scored = {name: {dense: {"miou": 40.0 + i} for dense in ("none", "default")} for i, name in enumerate(names)}
    row = {"drive": "0006R0", "scores": {"held": held, "left out": scored, "val": scored}}
    lines = pretrained["table"]({"one": row}).splitlines()[2:]
    assert lines[0] == "| drive 0006R0 | none | 1 | 40.0 | +4.0 | +8.0 | +2.0 | +0.0 | 0.25; 0 |"
    assert lines[1] == "| drive 0006R0 | default | 1 | 40.0 | +4.0 | +8.0 | +0.0 | +0.0 | 0; 0 |"


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
    about = {"network": "scratch", "images": 20, "scores": {"val": part}}
    runs = [about | {"seed": seed, "cpu_minutes": 1.0 + seed, "loss": [2.0, 0.5 + seed]} for seed in (0, 1)]
    for run, miou in zip(runs, (20.0, 31.0), strict=True):
        run["scores"] = {"val": part, "unseen drive": {"unary": {"miou": miou}, "crf": {"miou": miou + 1}}}
    cells = images["table"](runs).splitlines()[-1].strip("| ").split(" | ")
    assert cells[1:4] == ["20", "1.5", "1.00 (0.50 to 1.50)"]
    assert cells[4:] == ["10.0 (10.0 to 10.0)", "25.5 (20.0 to 31.0)"]
    assert images["table"](runs, "crf").splitlines()[-1].endswith("| 12.0 (12.0 to 12.0) | 26.5 (21.0 to 32.0) |")
    assert images["table"](runs[:1]).splitlines()[-1].endswith("| 0.50 | 10.0 | 20.0 |")


def test_the_differences_of_the_pipeline_are_paired_by_seed():
    pipeline = runpy.run_path(str(BENCHMARKS / "pipeline" / "run.py"))

    def scores(*values):
        result = {}
        for (_, stage, part), value in zip(pipeline["ROWS"], values, strict=True):
            result.setdefault(stage, {})[part] = dict.fromkeys(pipeline["SCORES"], value / 100)
        return result

    added = [1.0, 2.0, 6.0]
    runs = {str(seed): {"scores": scores(50, 60 + seed, 60 + seed + add, 0)} for seed, add in enumerate(added)}
    line = pipeline["differences"]({"scenes": runs}).splitlines()[3]
    half = stats.t.ppf(0.975, 2) * np.std(added, ddof=1) / np.sqrt(3)
    assert line == f"| Scenes | stage 2: CRF learned |{f' +3.0 ± {half:.1f} |' * 3}"


def test_the_network_of_the_target_sees_10_pixels():
    target = runpy.run_path(str(BENCHMARKS / "piecewise" / "target.py"))
    network = target["build_network"](0).eval()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    network.features(image)[0, :, 8, 12].sum().backward()
    rows, columns = (image.grad[0].abs().sum(dim) > 0 for dim in ((0, 2), (0, 1)))  # px that reach one cell
    assert 6 <= rows.sum() <= 10 and 6 <= columns.sum() <= 10


@pytest.fixture(scope="module")
def drives():
    return runpy.run_path(str(BENCHMARKS / "drives" / "run.py"))


def test_the_drives_hold_out_whole_drives_or_the_last_frames_of_each(drives):
    groups = [*"a" * 8, *"b" * 12]
    names = [f"{group}{9 - i % 10 if group == 'a' else 50 - i}" for i, group in enumerate(groups)]
    data = SegmentationDataset(
        None, name="made", split="train", names=names, groups=groups, class_names=("x", "y"), palette=voc_palette(2)
    )
    fit, held = drives["split"](data, "end")
    assert sorted(held.names) == sorted(sorted(n for n in names if n[0] == "a")[-2:] + sorted(names)[-3:])
    assert sorted(fit.names + held.names) == sorted(names)
    fit, held = drives["split"](data, "drive")
    assert set(held.groups) == {"a"} and set(fit.groups) == {"b"}


def test_the_drives_are_scored_at_two_sizes(drives):
    class Pairs(list):
        num_classes, class_names = 2, ("x", "y")

    logits = torch.tensor([[3.0, 3, -1, 3], [-1, -1, -1, -1]])  # of class x; y has 0
    label = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    network = torch.nn.Module()
    network.forward = lambda image: torch.stack([logits, torch.zeros(2, 4)])[None]

    def opposite(logits, image):
        return (-logits).log_softmax(1)

    image = torch.zeros(3, 2, 4)
    own, smaller = drives["score"](
        network, {"opposite": opposite}, Pairs([(image, label)]), Pairs([(image, torch.tensor([[0, 1]]))])
    )
    assert own["network"]["pixel_accuracy"] == 7 / 8 and own["opposite"]["pixel_accuracy"] == 1 / 8
    # Means of the probability of x over 2x2 px: 0.61 and 0.44, by sigmoid(3) = 0.95 and sigmoid(-1) = 0.27.
    assert smaller["network"]["pixel_accuracy"] == 1 and smaller["opposite"]["pixel_accuracy"] == 0


def test_the_drives_average_parameters_and_keep_the_first_models_statistics(drives):
    def model(value):
        result = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.data.fill_(value)
        return result

    one, other = model(1), model(3)
    mean = drives["averaged"](one, other)
    assert all((p == 2).all() for p in mean.parameters()) and all((b == 1).all() for b in mean.buffers())
    assert all((p == 1).all() for p in one.parameters()) and all((p == 3).all() for p in other.parameters())


def test_the_table_of_the_drives(drives):
    def outputs(*values):
        names = ("network", "default", "searched", "learned", "kernels", "fit", "all", "network, adapted")
        return {n: {"miou": v, "pixel_accuracy": v} for n, v in zip(names, values, strict=True)}

    about = {"network": "quick", "hold": "end", "drive": "0006R0"}
    runs = {
        str(seed): about | {"scores": {"left out": outputs(30, 31, 32, 33 + seed, 34, 36, 33, 28)}, "seed": seed}
        for seed in (0, 2)
    }
    _, stages, _, statistics, _, others, _ = drives["table"](runs).split("\n\n|")[1:]  # each of mIoU and of accuracy
    row = stages.splitlines()[2]
    half = stats.t.ppf(0.975, 1) * np.std([3, 5], ddof=1) / np.sqrt(2)
    cells = ["quick", "end", "drive 0006R0", "2", "30.0 ± 0.0", "+1.0 ± 0.0", "+2.0 ± 0.0", f"+4.0 ± {half:.1f}"]
    assert row[2:].split(" | ")[:8] == cells
    assert row.endswith(f"+4.0 ± 0.0 | +2.0 ± {half:.1f} | -1.0 ± {half:.1f} |  |  |")  # two columns are not stored
    assert "| 30.0 ± 0.0 | -2.0 ± 0.0 |  |" in statistics.splitlines()[2]
    assert others.splitlines()[2].endswith(f"| 30.0 ± 0.0 | +1.0 ± 0.0 | +3.0 ± {half:.1f} | +3.0 ± 0.0 |  |  |  |")


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "three_stages"))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    yield runpy.run_path(str(BENCHMARKS / "three_stages" / "claims.py"))
    sys.modules.pop("run", None)


def test_the_table_of_the_four_claims(claims):
    for count, f in claims["F_975"].items():
        assert abs(f - stats.f.ppf(0.975, count - 1, count - 1)) < 6e-4

    def run(method, seed, last, compute):
        # stage: (compute, validation mIoU, test mIoU, test accuracy) after each epoch
        curve = [[compute / 4, 40.0, 41.0, 80.0], [compute / 2, 60.0, last - 5, 85.0], [compute, 62.0, last, 90.0]]
        stage2 = [curve[0], [compute / 3, 58.0, last - 7, 84.0], [compute / 2, 57.0, last, 84.0]]
        curves = {"piecewise": {"stage2": stage2, "stage3": curve[1:]}}.get(method, {"stage3": curve})
        scores = {"test": {"crf": {"miou": last}}, "default CRF": {"crf": {"miou": last - 10}}}
        return {"network": "stride8", "method": method, "seed": seed, "curves": curves, "compute": compute, **scores}

    ours, alone, joint = [70.0, 74.0, 72.0], [66.0, 65.0, 67.0], [71.0, 73.0, 75.0]
    spent = [300.0, 400.0, 350.0]
    runs = {}
    for seed in range(3):
        runs[f"a{seed}"] = run("piecewise", seed, ours[seed], 200.0)
        runs[f"b{seed}"] = run("independent", seed, alone[seed], 100.0)
        runs[f"c{seed}"] = run("joint", seed, joint[seed], spent[seed])
        crfs = {"learned": ours[seed], "kernels": alone[seed], "searched": alone[seed] - seed}
        runs[f"d{seed}"] = {"network": "stride8", "CRFs of stage 2": crfs}
    lines = {line.split(" | ")[0].strip("| "): line for line in claims["table"](runs).splitlines()}

    def plus_minus(values, sign="+"):
        half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
        return f"{np.mean(values):{sign}.1f} ± {half:.1f}"

    def interval_of_ratio(a, b):
        ratio, factor = np.std(a) / np.std(b), np.sqrt(stats.f.ppf(0.975, len(a) - 1, len(a) - 1))
        return f"{ratio:.2f} [{ratio / factor:.2f}, {ratio * factor:.2f}]"

    found = lines["independent, searched CRF"].split(" | ")
    assert found[2:5] == ["65.0", "3 of 3", f"{np.std(alone, ddof=1):.1f}"]
    assert found[5] == interval_of_ratio(ours, alone)
    # Joint training has ended its second epoch, and not its third, at the compute of "piecewise".
    assert lines["joint, equal compute"].split(" | ")[1] == plus_minus(np.subtract(joint, 5), "")
    after_stage2 = lines["piecewise, after stage 2"].split(" | ")
    assert after_stage2[1] == plus_minus(np.subtract(ours, 7), "")
    assert after_stage2[-1].startswith("100 ± 0")  # all of stage 2, not until its best epoch
    expected = {
        "piecewise - independent, searched CRF": np.subtract(ours, alone),
        "piecewise - joint, at its own end": np.subtract(ours, joint),
        "stage 2 - default CRF, same network": np.subtract(ours, 48),
        "piecewise, after stage 2 - independent, searched CRF": np.subtract(np.subtract(ours, 7), alone),
        "joint, at its own end - independent, searched CRF": np.subtract(joint, alone),
        "stage 2 - learned kernels, Potts, same network": np.subtract(ours, alone),
        "stage 2 - searched CRF, same network": np.subtract(ours, np.subtract(alone, range(3))),
    }
    for title, values in expected.items():
        assert lines[title].endswith(f"| {plus_minus(values)} |")
    assert lines["compute of piecewise / of independent"].endswith("| 2.0 |")
    assert lines["joint runs that end within the compute of piecewise"].endswith("| 0 of 3 |")
    without = lines["SD of piecewise / joint at its own end, without the seed of the lowest run"]
    assert without.endswith(f"| {interval_of_ratio(ours[1:], joint[1:])} |")
    # Validation: 62 at the end, 60 at half of it; in stage 2 of "piecewise", 58 at a third.
    for margin, ours_at, joint_at in ((0, 200, 1), (1, 200, 1), (2, 100, 0.5), (5, 200 / 3, 0.5)):
        logs = np.log(np.multiply(spent, joint_at) / ours_at)
        half = stats.t.ppf(0.975, 2) * np.std(logs, ddof=1) / np.sqrt(3)
        low, mean, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
        title = f"compute of joint / of piecewise, to the target - {margin}"
        assert lines[title].endswith(f"| {mean:.2f} [{low:.2f}, {high:.2f}] |")


def test_the_table_of_weights_in_the_context_grid():
    grid = runpy.run_path(str(BENCHMARKS / "context" / "grid.py"))
    weights = grid["SETTINGS"]["weights"]

    def rows(seed):
        sweep = {str(w): [0.0, 60.0 + seed + 4 * w] for w in weights}
        parts = {"sweep, none": sweep, "sweep, default": sweep, "none": {"weight": 1}, "default": {"weight": 0}}
        plain = {dense: {"miou": 61.0 - seed} for dense in grid["DENSE"]}
        context = {"tree": parts, "reparametrised": parts}
        learned = {"learned": {"weights": [0.5, 0.25]}}
        return {"plain": plain, "larger": plain} | {name: part | learned for name, part in context.items()}

    runs = {str(seed): {"seed": seed, "field": "whole", "rows": rows(seed)} for seed in (0, 2)}
    runs["1"] = {"seed": 1, "field": "whole", "rows": {"plain": {}}}  # not complete
    first = grid["weights_table"](grid["complete"](runs)).splitlines()[2].split(" | ")
    half = stats.t.ppf(0.975, 1) * np.std([-1, 3], ddof=1) / np.sqrt(2)
    assert first[-4:] == [f"+1.0 ± {half:.1f}", "+4.0 ± 0.0", "1, 1", "0.50/0.25, 0.50/0.25 |"]
