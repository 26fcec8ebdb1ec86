"""The contextual CRF as a part of the model: what each stage trains, resuming, the command line."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_fixtures import CLASSES
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from pwlib import checkpoints
from pwlib.cli.parser import main
from pwlib.context import ContextualCRF
from pwlib.course.piecewise import structured
from pwlib.crf import DenseCRF
from pwlib.data import load
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, FeatMapNet, cell_labels, resize_logits
from pwlib.objective import Objective, TrainerOptions
from pwlib.tools.tiling import predict
from pwlib.trainer import PiecewiseTrainer

SIZE, K = (24, 36), 10


def model_of(unary=None, **options):
    torch.manual_seed(0)
    if unary is None:
        unary = FeatMapNet(K, scales=(1.0, 0.5), pyramid=(3,), width=1 / 32, output_stride=8, dilation=1)
    context = ContextualCRF(K, unary.feature_channels, hidden=8, **options)
    crf = DenseCRF(K, theta_alpha=6.0, theta_beta=20.0, theta_gamma=1.5, w_bilateral=3.0, w_spatial=1.0)
    return PiecewiseTrainedModel(K, 2, unary=unary, context=context, crf=crf)


def scenes(split="train", length=6):
    return DataLoader(load("scenes", split, size=SIZE, length=length), batch_size=3, shuffle=split == "train")


def trainer_of(model, **options):
    options = {"optimizer": "adamw", "train_iterations": 2, "test_iterations": 2, "progress": False, **options}
    return PiecewiseTrainer(model, "cpu", K, 1e-2, **options)


def changed(model, train):
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    train()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def names(model, *parts):
    return {name for name, _ in model.named_parameters() if name.startswith(parts)}


@pytest.mark.parametrize("unary", [None, "deeplab"])
def test_outputs_are_those_of_the_parts_in_order(unary):
    """Network, context on its map, resize, dense CRF, at a size that is not a whole number of cells."""
    model = model_of(unary and DeepLabLargeFOV(K, width=1 / 32)).eval()
    model.context.networks["surrounding"].scores.bias.data.normal_()
    image = torch.rand(2, 3, 27, 37)
    with torch.no_grad():
        outputs = model.outputs(image)
        features = model.unary.features(image)
        logits = model.unary.head(features)
        log_q = model.context(logits, features)
        stride = 8 if unary else None
        torch.testing.assert_close(outputs["unary"], model.unary(image))
        torch.testing.assert_close(outputs["unary"], resize_logits(logits, (27, 37), stride=stride))
        torch.testing.assert_close(outputs["context"], resize_logits(log_q, (27, 37), stride=stride))
        torch.testing.assert_close(outputs["crf"], model.crf(outputs["context"], image, iterations=2))
        assert (outputs["context"].softmax(1) - outputs["unary"].softmax(1)).abs().max() > 0.01
        pair = model(image)
        assert torch.equal(pair[0], outputs["unary"]) and torch.equal(pair[1], outputs["crf"])
        assert model(image, apply_crf=False)[1] is None
        torch.testing.assert_close(predict(model, image[0]), outputs["crf"][0].softmax(0))
        torch.testing.assert_close(predict(model, image[0], apply_crf=False), outputs["unary"][0].softmax(0))


def test_a_context_for_another_network_is_rejected():
    context = ContextualCRF(K, 7)
    for unary, says in [(FeatMapNet(K, width=1 / 64), "gives 72 for 10"), (nn.Conv2d(3, K, 1), "gives none for 10")]:
        with pytest.raises(ValueError, match=says):
            PiecewiseTrainedModel(K, unary=unary, context=context)


@pytest.mark.parametrize("joint", [False, True])
def test_stage_1_trains_the_pairwise_networks_with_joint_pairwise_only(joint):
    model = model_of()
    found = changed(model, lambda: trainer_of(model, joint_pairwise=joint).train_stage1(scenes(), 1))
    assert found == names(model, "unary.", "context.networks" if joint else "unary.")


@pytest.mark.parametrize("crf_loss", ["marginal", structured])
def test_stage_2_trains_both_crfs_and_not_the_network(crf_loss, monkeypatch):
    model = model_of()
    expected = names(model, "context.", "crf.")
    if crf_loss is structured:  # runs no inference, and does not train what only inference depends on
        expected -= {"context.weight", "context.log_temperature"}
        monkeypatch.setattr(ContextualCRF, "forward", lambda *_: pytest.fail("inference was run"))
        monkeypatch.setattr(DenseCRF, "forward", lambda *_: pytest.fail("inference was run"))
    assert changed(model, lambda: trainer_of(model, crf_loss=crf_loss).train_stage2(scenes(), 1)) == expected


@pytest.mark.parametrize("crf_loss", ["marginal", structured])
def test_stage_2_keeps_the_pairwise_networks_that_stage_1_trained(crf_loss):
    model = model_of()
    expected = names(model, "crf.") | (
        {"context.weight", "context.log_temperature"} if crf_loss == "marginal" else set()
    )
    trainer = trainer_of(model, crf_loss=crf_loss, joint_pairwise=True)
    assert changed(model, lambda: trainer.train_stage2(scenes(), 1)) == expected
    assert all(parameter.requires_grad for parameter in model.parameters()), "as they were before"


@pytest.mark.parametrize(("scale", "expected"), [(30, 0.0), (300, 1.0), (-300, 0.1), (-30, 0.7)])
def test_stage_2_starts_with_the_weight_that_makes_the_labels_most_likely(scale, expected):
    """The oracle tries all weights of random pairwise scores, each with the best of many temperatures."""
    model, candidates = model_of(), (0.7, 1.0, 0.5, 0.25, 0.1, 0.0)  # the first is that of the model
    for network in model.context.networks.values():
        network.scores.weight.data *= scale
    batches = scenes()
    image, label = (torch.cat(part) for part in zip(*batches, strict=True))
    losses = {}
    for weight in candidates:
        model.context.weight.data.fill_(weight)
        with torch.no_grad():
            log_q = model.eval().outputs(image, iterations=2)["crf"].double()
        temperatures = torch.logspace(-1.3, 1.3, 200, dtype=torch.float64)
        losses[weight] = min(F.cross_entropy(log_q / t, label, ignore_index=255).item() for t in temperatures)
    assert min(losses, key=losses.get) == expected

    def weight_after(given=batches, frozen=False, **options):
        model.train().context.weight.data.fill_(0.7)
        model.context.weight.requires_grad_(not frozen)
        options = {"joint_pairwise": True, "crf_learning_rate": 1e-9, "train_iterations": 2, **options}
        trainer_of(model, **options).train_stage2(given, 1)
        return model.context.weight.tolist()

    assert weight_after() == pytest.approx([expected] * 2, abs=1e-6)
    as_it_is = pytest.approx([0.7] * 2, abs=1e-6)
    assert weight_after(context_weights=()) == as_it_is
    assert weight_after(frozen=True) == as_it_is
    assert weight_after(joint_pairwise=False) == as_it_is  # its terms are not trained yet
    void = [(image[:1], torch.full_like(label[:1], 255))] * 4  # nothing to choose by
    assert weight_after([*void, (image, label)]) == as_it_is


@pytest.mark.parametrize("weights", [(1.0, -0.5), (float("nan"),), (float("inf"), 0.0)])
def test_weights_that_cannot_be_tried(weights):
    with pytest.raises(ValueError, match=r"context_weights are .*; expected finite numbers of at least 0"):
        TrainerOptions(K, context_weights=weights)


def test_stage_3_trains_everything():
    model = model_of()
    assert changed(model, lambda: trainer_of(model).train_stage3(scenes(), 1)) == {
        n for n, _ in model.named_parameters()
    }


def test_gradients_of_the_pair_loss():
    """In stage 1 the gradient of the joint loss is that of the network's loss plus that of the pair loss. In stage 2
    the pairwise networks get the gradient of the pair loss alone, and none from the marginals."""
    image, label = (torch.stack(part) for part in zip(*load("scenes", "train", size=SIZE, length=2), strict=True))
    weights = torch.linspace(0.5, 2, K)

    def gradient(module, loss):
        module.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    model = model_of().eval()

    def network_loss(logits, label):
        return F.cross_entropy(logits, label, ignore_index=255)

    def objective(stage, joint=False):
        options = {"loss": network_loss, "train_iterations": 2, "class_weights": weights, "joint_pairwise": joint}
        return Objective(model, stage, TrainerOptions(K, **options)).eval()

    alone = gradient(model, objective(1)(image, label)[0])
    both = gradient(model, objective(1, joint=True)(image, label)[0])
    features, logits = model.maps(image)
    cells = cell_labels(label, logits.shape[-2:])
    pairs = gradient(model, model.context.pair_loss(logits, features, cells, class_weights=weights))
    for name, total in both.items():
        expected = sum(part.get(name, torch.zeros_like(total)) for part in (alone, pairs))
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)
    assert pairs["unary.blocks.0.0.weight"].abs().max() > 0 and "unary.head.0.weight" not in pairs
    stage2 = gradient(model, objective(2)(image, label)[0])
    assert not any(name.startswith("unary.") for name in stage2)
    for name in names(model, "context.networks"):
        torch.testing.assert_close(stage2[name], pairs[name], atol=1e-6, rtol=1e-4)
    assert stage2["context.weight"].abs().max() > 0
    left = gradient(model, objective(2, joint=True)(image, label)[0])
    assert not any(left[name].any() for name in names(model, "context.networks") & left.keys())
    assert left["context.weight"].abs().max() > 0


def interrupt():
    raise KeyboardInterrupt


def test_a_run_is_resumed_and_loaded(tmp_path, monkeypatch):
    def run(out, stages, **options):
        model = model_of()
        options["context_weights"] = np.linspace(1, 0, 3)  # stored as numbers
        trainer = trainer_of(model, out=out, joint_pairwise=True, **options)
        trainer.train_stage1(scenes(), 1)
        if stages > 1:
            trainer.train_stage2(scenes(), 2, scenes("val", 3))
        return model, trainer

    whole, trainer = run(tmp_path / "a", 2)
    assert list(trainer.history["stage2"][-1]["val"]) == ["unary", "context", "crf"]
    run(tmp_path / "b", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after the first epoch of stage 2
        epoch = PiecewiseTrainer._epoch
        patch.setattr(PiecewiseTrainer, "_epoch", lambda *a: epoch(*a) if a[5:7] != (2, 2) else interrupt())
        run(tmp_path / "b", 2, resume=True)
    chosen = []
    monkeypatch.setattr(PiecewiseTrainer, "_choose_weight", lambda *a: chosen.append(a))
    resumed, _ = run(tmp_path / "b", 2, resume=True)
    assert not chosen, "only before the first epoch"
    other = model_of()
    checkpoints.load_model(tmp_path / "a" / "stage2-best.pt", other)
    for one in (resumed, other):
        for name, value in whole.state_dict().items():
            assert torch.equal(value, one.state_dict()[name]), name
    with pytest.raises(ValueError, match="joint_pairwise = True, this run has False"):
        trainer_of(model_of(), out=tmp_path / "a", resume=True).train_stage1(scenes(), 1)


@pytest.mark.slow
def test_the_command_line_trains_scores_and_predicts_with_context(pictures, tmp_path, capsys):
    run = str(tmp_path / "run")
    command = ["train", "--data", "folder", "--root", str(pictures), "--size", "24x36", "--epochs", "1,1,0", "--quiet"]
    assert main([*command, "--context", "--out", run]) == 0
    rows = [line[:32].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("stage")]
    assert rows == ["stage1 unary", "stage1 + CRF, default parameters", "stage2 unary", "stage2 context", "stage2 CRF"]
    assert main(["evaluate", run]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {stage: list(parts) for stage, parts in scores.items()} == {
        "stage1": ["unary", "context", "default_crf"],
        "stage2": ["unary", "context", "crf"],
    }
    picture = next((pictures / "val" / "images").iterdir())
    assert main(["predict", run, str(picture), "--out", str(tmp_path / "out")]) == 0
    label = np.asarray(Image.open(tmp_path / "out" / f"{picture.stem}-label.png"))
    assert label.shape == (24, 36) and label.max() < len(CLASSES)
    assert main(["train", "--out", run, "--resume", "--quiet"]) == 0  # nothing is left to train
    assert capsys.readouterr().out.count("stage2 context") == 1
