"""Training: what each stage may touch, what survives a kill, what several processes agree on."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import PLAIN, SIZE, K, run, tiny_model
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pwlib import checkpoints
from pwlib.crf import DenseCRF
from pwlib.data import Augment, load
from pwlib.evaluation import best_record, evaluate
from pwlib.model import PiecewiseTrainedModel
from pwlib.objective import calibrated, rate
from pwlib.trainer import PiecewiseTrainer

TINY_RUN = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are rounded in an order that depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of parameters and buffers that are not bit for bit what they were."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def scenes(length=8, **options):
    return DataLoader(load("scenes", "train", size=SIZE, length=length), batch_size=4, shuffle=True, **options)


def trainer_of(model, **options):
    return PiecewiseTrainer(model, "cpu", K, **{"learning_rate": 1e-2, "progress": False, **options})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run from beginning to end."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("whole"))


def differences(one, other):
    """What two runs disagree on, bit for bit: the weights of every stage's last and best epoch, and the history."""
    result = set()
    for path in sorted(one.glob("*.pt")):
        a, b = checkpoints.load(path)["model"], checkpoints.load(other / path.name)["model"]
        result |= {f"{path.stem} {name}" for name, value in a.items() if not torch.equal(value, b[name])}
    histories = [untimed(json.loads((out / "history.json").read_text())) for out in (one, other)]
    return result | ({"history"} if histories[0] != histories[1] else set())


def untimed(history):
    """A history without what depends on the clock."""
    clock = ("seconds", "images_per_second")
    return {
        stage: [{k: v for k, v in record.items() if k not in clock} for record in records]
        for stage, records in history.items()
    }


# --------------------------------------------------------------------------------------------------------------- stages


def test_stage_1_trains_the_network_alone():
    model = tiny_model()
    before = weights(model)
    trainer_of(model).train_stage1(scenes(), 1)
    names = changed(before, model)
    assert names >= {f"unary.{name}" for name, _ in model.unary.named_parameters() if name.endswith("weight")}
    assert any("running_mean" in name for name in names)
    assert not any(name.startswith("crf.") for name in names)


@pytest.mark.parametrize("crf_loss", ["marginal", "piecewise"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stage_2_trains_every_parameter_of_the_crf_and_not_a_bit_of_the_network(crf_loss, optimizer):
    model = tiny_model()
    trainer_of(model).train_stage1(scenes(), 1)
    before = weights(model)
    trainer_of(model, crf_loss=crf_loss, optimizer=optimizer).train_stage2(scenes(), 1)
    assert changed(before, model) == {f"crf.{name}" for name, _ in model.crf.named_parameters()}


def test_stage_3_trains_everything_and_frozen_parameters_of_yours_stay_frozen():
    model = tiny_model()
    model.unary.blocks[0][0].weight.requires_grad_(False)
    before = weights(model)
    trainer_of(model).train_stage3(scenes(), 1)
    frozen = "unary.blocks.0.0.weight"
    names = {name for name, _ in model.named_parameters()}
    assert {name for name in changed(before, model) if name in names} == names - {frozen}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [frozen]


def test_stage_3_takes_smaller_steps():
    steps = []
    for stage in ("train_stage1", "train_stage3"):
        model = tiny_model(dropout=0.0)
        before = weights(model)["unary.classifier.weight"]
        getattr(trainer_of(model, clip=None, weight_decay=0.0), stage)(scenes(4), 1)
        steps.append((model.unary.classifier.weight - before).norm())
    assert steps[1] < 0.5 * steps[0]


def test_train_piecewise_holds_out_what_stage_2_learns_on():
    """Stage 1 sees no held-out image, stage 2 sees no others, and as they are; stage 3 sees all."""
    dataset, asked = load("scenes", "train", size=SIZE, length=12), {True: [], False: []}
    # Augmented means flipped, and nothing else: so every image the network meets can be told.
    both = ((i, image) for i in range(12) for image in (dataset[i][0], dataset[i][0].flip(-1)))
    index = {tuple(image.flatten().tolist()): i for i, image in both}
    plain = {tuple(dataset[i][0].flatten().tolist()) for i in range(12)}
    model = tiny_model()

    def spy(unary, inputs):
        keys = [tuple(one.flatten().tolist()) for one in inputs[0]]
        asked[unary.training].extend((index[key], key in plain) for key in keys)

    model.unary.register_forward_pre_hook(spy)
    flip = Augment(scale=(1, 1), flip=1.0, colour=0.0)
    loader = DataLoader(dataset.with_transform(flip), batch_size=3, shuffle=True)
    trainer_of(model).train_piecewise(loader, 1, 1, 1)
    fitted, held, everything = asked[True][:9], asked[False], asked[True][9:]
    # Each held image is seen twice: for the temperature, and in the epoch.
    assert len(held) == 6 and all(as_it_is for _, as_it_is in held)
    assert not any(as_it_is for _, as_it_is in fitted + everything)
    assert {i for i, _ in fitted}.isdisjoint(i for i, _ in held)
    seen = sorted(i for i, _ in fitted + held[:3])
    assert seen == list(range(12)) == sorted(i for i, _ in everything)


def test_any_iterable_of_batches_will_do(capsys):
    batches = [(torch.rand(2, 3, *SIZE), torch.randint(0, K, (2, *SIZE))) for _ in range(2)]
    history = trainer_of(tiny_model(), progress=None).train_piecewise(batches, 1, 1, 0, val_loader=batches)
    assert [len(history[stage]) for stage in ("stage1", "stage2")] == [1, 2]
    assert "on the images stage 1 was fitted to" in capsys.readouterr().err


def test_a_crf_learns_to_remove_noise():
    """Two flat regions, a unary that is right on average and wrong on a fifth of the pixels: the CRF starts useless
    (weights of 0.01), and must learn to smooth."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(12, 16, 16, dtype=torch.int64)
    label[:, :, 8:] = 1
    image = torch.where(label[:, None] == 1, 0.8, 0.2).expand(-1, 3, -1, -1).contiguous()
    image[:, :2] = torch.rand(12, 2, 16, 16, generator=generator)

    class Noisy(nn.Module):
        def forward(self, image):
            wrong = image[:, 0] < 0.2  # the red channel is noise: it decides where the unary errs
            right = (image[:, 2] > 0.5) ^ wrong
            return torch.stack([1 - right.float(), right.float()], 1) * 2

    crf = DenseCRF(2, theta_alpha=5.0, theta_beta=150.0, theta_gamma=1.0, w_bilateral=0.01, w_spatial=0.01)
    model = PiecewiseTrainedModel(2, unary=Noisy(), crf=crf)
    loader = DataLoader(TensorDataset(image, label), batch_size=4)
    trainer = PiecewiseTrainer(model, "cpu", 2, optimizer="adamw", crf_learning_rate=0.3, progress=False)
    history = trainer.train_stage2(loader, 10, val_loader=loader)["stage2"]
    first, best = history[0]["val"], best_record(history)["val"]
    assert first["unary"]["pixel_accuracy"] == pytest.approx(0.8, abs=0.03)
    assert first["crf"]["pixel_accuracy"] < 0.85
    assert best["crf"]["pixel_accuracy"] > 0.97


def test_the_best_epoch_is_what_is_kept(whole_run):
    trainer = whole_run
    val = DataLoader(load("scenes", "val", size=SIZE, length=5), batch_size=2)
    assert trainer.evaluate(val) == best_record(trainer.history["stage3"])["val"]
    json.dumps(trainer.history, allow_nan=False)


def test_stage_1_can_keep_its_last_epoch_instead(tmp_path):
    """With no labelled pixel to validate on all epochs are equal: "best" keeps the first of them, "last" the last."""
    val = [(torch.rand(2, 3, *SIZE), torch.full((2, *SIZE), 255))]
    batches = [(torch.rand(2, 3, *SIZE), torch.randint(0, K, (2, *SIZE))) for _ in range(2)]
    kept = {}
    for keeps in ("best", "last"):
        trainer = trainer_of(tiny_model(), stage1_keeps=keeps, out=tmp_path / keeps)
        records = trainer.train_stage1(batches, 3, val_loader=val)["stage1"]
        kept[keeps] = best_record(records)["epoch"]
        stored = torch.load(tmp_path / keeps / "stage1-best.pt", weights_only=True)
        assert stored["epoch"] == kept[keeps]
        last = torch.load(tmp_path / keeps / "stage1-last.pt", weights_only=True)["model"]
        same = all(torch.equal(value, last[key]) for key, value in trainer.model.state_dict().items())
        assert same == (keeps == "last")
    assert kept == {"best": 1, "last": 3}


def test_the_temperature_is_the_one_a_search_finds():
    """Labels drawn from softmax(z / 2.5): brute force over a fine grid, and the truth behind the draws."""
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(20_000, 5, generator=generator)
    label = torch.multinomial(torch.softmax(z / 2.5, 1), 1, generator=generator)[:, 0]
    got = calibrated(z, label)
    grid = torch.arange(1.5, 3.5, 0.002)
    searched = grid[torch.stack([nn.functional.cross_entropy(z / t, label) for t in grid]).argmin()].item()
    assert got == pytest.approx(searched, abs=0.003)
    assert got == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(("labels", "temperature"), [("right", 1 / 20), ("wrong", 20.0), ("none", 1.0)])
def test_a_temperature_without_an_optimum_stays_in_bounds(labels, temperature):
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    label = {"right": z.argmax(1), "wrong": z.argmin(1), "none": None}[labels]
    got = calibrated(z[:0], z[:0, 0].long()) if label is None else calibrated(z, label)
    assert got == pytest.approx(temperature)


def test_stage_2_learns_at_the_temperature_its_images_ask_for(monkeypatch):
    """A network twice as sure as it is right, and a CRF with nothing to add: T = 2 in every epoch."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(8, K, 16, 16, generator=generator)
    label = torch.multinomial(torch.softmax(z, 1).movedim(1, -1).reshape(-1, K), 1, generator=generator)
    crf = DenseCRF(K, w_bilateral=1e-6, w_spatial=1e-6, theta_alpha=2.0, filtering="exact")
    model = PiecewiseTrainedModel(K, unary=Lookup(2 * z), crf=crf)
    image = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16) / 8
    data = DataLoader(TensorDataset(image, label.reshape(8, 16, 16)), batch_size=4)
    trainer = trainer_of(model, crf_learning_rate=1e-9)
    used, epoch = [], trainer._epoch
    monkeypatch.setattr(
        trainer, "_epoch", lambda objective, *rest: used.append(objective.temperature) or epoch(objective, *rest)
    )
    trainer.train_stage2(data, 2)
    assert used == pytest.approx([2, 2], abs=0.15)
    # The same images at T: the loss is what the labels were drawn from would give.
    truth = nn.functional.cross_entropy(z, label.reshape(8, 16, 16)).item()
    assert trainer.history["stage2"][-1]["loss"] == pytest.approx(truth, rel=0.01)
    used.clear()
    trainer.train_stage3(data, 1)
    assert used == [1.0]


class Lookup(nn.Module):
    """A network that knows its images by heart: logits [8, K, H, W] of the images of constant value i / 8."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, image):
        return self.logits[(image[:, 0, 0, 0] * 8).round().long()]


@pytest.mark.parametrize("keeps", ["best", "last"])
def test_patience_stops_a_stage_that_no_longer_improves(keeps):
    """The best score is epoch 2's: two epochs without a better one end the stage, whichever epoch is kept."""
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.7])
    trainer = trainer_of(tiny_model(), patience=2, stage1_keeps=keeps)
    trainer.evaluate = lambda *_, **__: {"unary": {"miou": next(scores)}}
    records = trainer.train_stage1(scenes(4), 5, scenes(2))["stage1"]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert best_record(records)["epoch"] == {"best": 2, "last": 4}[keeps]


def test_patience_needs_a_validation_score():
    with pytest.raises(ValueError, match="patience is 2, but stage 1 has no val_loader"):
        trainer_of(tiny_model(), patience=2).train_stage1(scenes(4), 5)


@pytest.mark.parametrize(("stage", "best"), [(1, 1), (2, 0), (3, 0)])
def test_a_stage_can_be_trained_again(stage, best):
    """As when a notebook cell is run twice: the second call starts anew, and keeps the best of its own epochs even if
    none is better than the first call's."""
    model, states = tiny_model(), []
    trainer = trainer_of(model)
    scores = iter([0.9] * (2 if stage == 1 else 3) + [0.5, 0.4, 0.3])
    trainer.evaluate = lambda *_, **__: states.append(weights(model)) or {"unary": {"miou": next(scores)}}
    train = getattr(trainer, f"train_stage{stage}")
    train(scenes(4), 2, scenes(2))
    first = len(states)
    records = train(scenes(4), 2, scenes(2))[f"stage{stage}"]
    assert [record["epoch"] for record in records] == [best, *range(best + 1, 3)]
    assert not changed(states[first], model), "the first state of the second call scored best"


# ----------------------------------------------------------------------------------------- labels, weights, and batches


@pytest.mark.parametrize("crf_loss", ["marginal", "piecewise"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_train_alike(crf_loss, dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(4, 3, *SIZE, generator=generator)
    label = torch.randint(0, K, (4, *SIZE), generator=generator)
    label[:, :3] = 255
    histories = []
    for kind in (torch.int64, dtype):
        batches = list(zip(image.split(2), label.to(kind).split(2), strict=True))
        trainer = trainer_of(tiny_model(), crf_loss=crf_loss, class_weights=torch.linspace(0.5, 2, K))
        histories.append(untimed(trainer.train_piecewise(batches, 1, 1, 1, val_loader=batches)))
    assert histories[0] == histories[1]


IMAGE, LABEL = torch.rand(2, 3, *SIZE), torch.zeros(2, *SIZE, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGE, "mask": LABEL}, "a batch is a dict of image, mask"),
        ((IMAGE, LABEL, ["a", "b"]), "a batch is a tuple of 3"),
        (IMAGE, "a batch is a Tensor"),
        ((IMAGE, {"mask": LABEL}), "a batch is a tuple of Tensor, dict"),
        ((IMAGE, LABEL[:, None]), r"a batch has images \[2, 3, 16, 24\] and labels \[2, 1, 16, 24\]"),
        ((IMAGE, LABEL[:1]), r"a batch has images \[2, 3, 16, 24\] and labels \[1, 16, 24\]"),
        ((IMAGE, LABEL.float()), "label has dtype torch.float32; expected class indices"),
    ],
)
def test_batches_that_are_not_images_and_labels_are_named(batch, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model()).train_stage1([batch], 1)
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model()).train_stage2([batch], 1)
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_model(), [batch])


def test_batches_without_a_length_are_named():
    with pytest.raises(ValueError, match="stage 1 was given a generator, which has no length"):
        trainer_of(tiny_model()).train_stage1((batch for batch in [(IMAGE, LABEL)]), 1)


def test_a_sampler_of_ones_own_decides_how_many_images_an_epoch_has():
    dataset = load("scenes", "train", size=SIZE, length=8)
    sampler = RandomSampler(dataset, replacement=True, num_samples=4)
    model, seen = tiny_model(), []
    model.unary.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer_of(model).train_stage1(DataLoader(dataset, batch_size=2, sampler=sampler), 1)
    assert seen == [2, 2]


@pytest.mark.parametrize("weights_of", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_class_weights_may_be_a_list(weights_of):
    given = torch.linspace(0.5, 2, K)
    batches = [(IMAGE, torch.arange(K).repeat(2 * SIZE[0] * SIZE[1])[: LABEL.numel()].view_as(LABEL))]
    one, other = (trainer_of(tiny_model(), class_weights=w) for w in (given, weights_of(given)))
    assert one.config == other.config
    assert untimed(one.train_stage1(batches, 1)) == untimed(other.train_stage1(batches, 1))


@pytest.mark.parametrize("loss", ["structured", {"cross_entropy": 1.0, "structured": 0.5}])
def test_a_loss_that_needs_the_crf_is_no_loss_of_the_network(loss):
    with pytest.raises(ValueError, match=r"loss 'structured' needs a CRF; .* crf_loss='piecewise'"):
        trainer_of(tiny_model(), loss=loss)


@pytest.mark.parametrize("class_weights", [[-1.0] + [1.0] * (K - 1), [math.nan] * K])
def test_class_weights_that_are_no_weights_are_named(class_weights):
    with pytest.raises(ValueError, match=f"expected {K} finite numbers, none negative"):
        trainer_of(tiny_model(), class_weights=class_weights)


def test_a_last_batch_of_one_image_is_too_small_for_batch_norm():
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, K, 1))
    model = PiecewiseTrainedModel(K, unary=pooled, crf=DenseCRF(K))
    loader = DataLoader(load("scenes", "train", size=SIZE, length=3), batch_size=2)
    with pytest.raises(ValueError, match=r"batch normalisation cannot train on a batch of 1 image.*drop_last=True"):
        trainer_of(model).train_stage1(loader, 1)


# ---------------------------------------------------------------------------------------------- training and evaluation


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_leaves_every_module_in_its_mode(stage):
    model = tiny_model()
    model.unary.blocks[1].eval()
    before = modes(model)
    assert len(set(before.values())) == 2
    getattr(trainer_of(model), f"train_stage{stage}")(scenes(4), 1, scenes(2))
    assert modes(model) == before


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_batch_norm_keeps_its_statistics(stage):
    """Frozen means both: evaluation mode, and no parameter that wants a gradient. Evaluation mode alone is often left
    over from an earlier evaluation, and is no reason not to train."""
    model = tiny_model()
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    frozen, left_over = norms[:2]
    model.get_submodule(frozen).requires_grad_(False).eval()
    model.get_submodule(left_over).eval()
    before = weights(model)
    getattr(trainer_of(model), f"train_stage{stage}")(scenes(4), 1)
    names = changed(before, model)
    assert not any(name.startswith(f"{frozen}.") for name in names)
    assert f"{left_over}.running_mean" in names


# ---------------------------------------------------------------------------------------------------- rates, precision


def test_schedules_are_torchs():
    for total in (50, 333):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        poly = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=0.9)
        for step in range(total):
            assert rate("poly", step / total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
            optimizer.step()
            poly.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5000, cycle_momentum=False)
    for step in range(4999):
        assert rate("onecycle", step / 4999) == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-3)
        optimizer.step()
        cycle.step()


def test_the_rate_of_every_step_is_the_schedules(monkeypatch):
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (seen.append(self.param_groups[0]["lr"]), step(self)))
    trainer_of(tiny_model(), learning_rate=0.01, schedule="poly").train_stage1(scenes(8), 3)
    assert seen == pytest.approx([0.01 * (1 - i / 6) ** 0.9 for i in range(6)])


def test_gradients_are_clipped(monkeypatch):
    norms = []
    step = torch.optim.SGD.step

    def spy(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    trainer_of(tiny_model(), clip=None).train_stage1(scenes(4), 1)
    trainer_of(tiny_model(), clip=0.01).train_stage1(scenes(4), 1)
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_reaches_the_network_and_not_the_crf(monkeypatch):
    seen = []
    forward = DenseCRF.forward

    def spy(self, logits, image, **options):
        log_q = forward(self, logits, image, **options)
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu"), log_q.dtype))
        return log_q

    monkeypatch.setattr(DenseCRF, "forward", spy)
    model = tiny_model()
    dtypes = set()
    model.unary.classifier.register_forward_hook(lambda *a: dtypes.add((model.unary.training, a[-1].dtype)))
    trainer_of(model, amp=True).train_stage3(scenes(4), 1)
    assert dtypes == {(True, torch.bfloat16)}
    assert seen == [(torch.float32, False, torch.float32)]


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_counts_every_image_once_whatever_the_batches():
    model = tiny_model().eval()
    dataset = load("scenes", "val", size=SIZE, length=5)
    right, total = {"unary": 0, "crf": 0}, 0
    with torch.no_grad():
        for image, label in (dataset[i] for i in range(5)):
            for name, output in zip(right, model(image[None]), strict=True):
                right[name] += int((output.argmax(1)[0] == label)[label != 255].sum())
            total += int((label != 255).sum())
    for batch in (1, 2, 5):
        scores = evaluate(model, DataLoader(dataset, batch_size=batch))
        for name in right:
            assert scores[name]["pixel_accuracy"] == pytest.approx(right[name] / total)
    assert list(scores["unary"]["per_class_iou"]) == list(dataset.class_names)
    assert evaluate(model, DataLoader(dataset), apply_crf=False).keys() == {"unary"}


def test_evaluate_leaves_every_module_in_its_mode():
    model = tiny_model()
    model.unary.eval()
    before = modes(model)
    evaluate(model, [(IMAGE, LABEL)])
    assert modes(model) == before
    with pytest.raises(ValueError, match="a batch is"):
        evaluate(model, [IMAGE])
    assert modes(model) == before


# ----------------------------------------------------------------------------------------------------------- randomness


def test_outside_randomness_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trainer_of(tiny := tiny_model_without_seeding()).train_stage1(scenes(4), 1)
    assert torch.equal(torch.rand(3), expected) and tiny is not None


def tiny_model_without_seeding():
    with torch.random.fork_rng([]):
        return tiny_model()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, whole_run):
    assert not differences(whole_run.out, run(tmp_path / "0").out)
    assert differences(whole_run.out, run(tmp_path / "1", seed=1).out) >= {"history", "stage1-last unary.fc6.0.weight"}


# ---------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
def test_killed_in_every_stage_and_resumed_gives_the_run_that_was_not(tmp_path, whole_run):
    """SIGKILL in the second epoch of stage 1; resumed and killed in stage 2; again in stage 3; resumed to the end."""
    out = tmp_path / "run"

    def start(*options):
        command = [sys.executable, str(TINY_RUN), str(out), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    expected = {"stage1-last.pt", "stage1-best.pt", "history.json"}
    # Before each of its epochs stage 2 looks at its 4 images once more, for the temperature.
    kills = ((8 + 4, set()), (8 + 4 + 4 + 4 + 2, {"stage2-last.pt", "stage2-best.pt"}), (4 + 4 + 12 + 5, None))
    for kill_at, extra in kills:
        options = ["--kill-at", str(kill_at)] + (["--resume"] if out.exists() else [])
        assert (process := start(*options)).returncode == -signal.SIGKILL, process.stderr
        expected |= extra if extra is not None else {"stage3-last.pt", "stage3-best.pt"}
        assert {path.name for path in out.iterdir()} == expected
    assert (process := start("--resume")).returncode == 0, process.stderr
    assert not differences(whole_run.out, out)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("loss", ["nothing", "optimizer"])
def test_what_resuming_needs_is_in_the_checkpoint(tmp_path, whole_run, loss):
    """The planted fault: with the optimizer's momentum lost, the resumed run must not be taken for the same."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=8 + 4, then=interrupt)
    path = tmp_path / "stage1-last.pt"
    if loss == "optimizer":
        state = checkpoints.load(path)
        state["optimizer"]["state"] = {}
        checkpoints.save(path, state)
    run(tmp_path, resume=True)
    assert bool(differences(whole_run.out, tmp_path)) == (loss == "optimizer")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = run(tmp_path, resume=True, stop_at=1, then=interrupt)
    assert not changed(weights(first.model), again.model) and again.history == first.history
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


# ---------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """torchrun with gloo: batches of 2 in each of two processes against batches of 4 in one, all three stages."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, str(TINY_RUN), str(tmp_path), "--distributed"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    two = json.loads((tmp_path / "history.json").read_text())
    one = run(batch=4, **PLAIN)
    state = checkpoints.load(tmp_path / "stage3-best.pt")["model"]
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for stage, records in one.history.items():
        for a, b in zip(records, two[stage], strict=True):
            assert a["epoch"] == b["epoch"]
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            for part in a["val"]:
                assert a["val"][part]["pixels"] == b["val"][part]["pixels"]
                for score in ("miou", "pixel_accuracy", "boundary_iou"):
                    assert a["val"][part][score] == pytest.approx(b["val"][part][score], abs=2e-3)


# ------------------------------------------------------------------------------------------------------------ full disk


def test_a_disk_that_fills_during_training_leaves_a_run_to_resume(tmp_path, whole_run, monkeypatch):
    write = checkpoints.write_atomically

    def full(path, data):
        if Path(path).name == "stage2-last.pt":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert not differences(whole_run.out, run(tmp_path, resume=True).out)


def test_no_number_is_nan(whole_run):
    numbers = [record["loss"] for records in whole_run.history.values() for record in records if "loss" in record]
    assert len(numbers) == 6 and all(math.isfinite(number) for number in numbers)
