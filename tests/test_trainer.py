"""The trainer: parameters of each stage, options, batches, modes, precision, evaluation."""

import math

import pytest
import torch
from tiny_run import SIZE, K, changed, tiny_model, untimed, weights
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pwlib.course.piecewise import structured
from pwlib.crf import DenseCRF
from pwlib.data import Augment, hold_out, load
from pwlib.evaluation import best_record, evaluate
from pwlib.model import PiecewiseTrainedModel
from pwlib.objective import Objective, fit_temperature, schedule_factor
from pwlib.trainer import PiecewiseTrainer, averaged

pytestmark = pytest.mark.usefixtures("one_thread")


def scenes(length=8, **options):
    return DataLoader(load("scenes", "train", size=SIZE, length=length), batch_size=4, shuffle=True, **options)


def trainer_of(model, **options):
    return PiecewiseTrainer(model, "cpu", K, **{"learning_rate": 1e-2, "progress": False, **options})


# --------------------------------------------------------------------------------------------------------------- stages


def test_stage_1_trains_the_network_alone():
    model = tiny_model()
    before = weights(model)
    trainer_of(model).train_stage1(scenes(), 1)
    names = changed(before, model)
    assert names >= {f"unary.{name}" for name, _ in model.unary.named_parameters() if name.endswith("weight")}
    assert any("running_mean" in name for name in names)
    assert not any(name.startswith("crf.") for name in names)


@pytest.mark.parametrize("crf_loss", ["marginal", structured])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stage_2_trains_every_parameter_of_the_crf_and_none_of_the_network(crf_loss, optimizer):
    model = tiny_model()
    trainer_of(model).train_stage1(scenes(), 1)
    before = weights(model)
    trainer_of(model, crf_loss=crf_loss, optimizer=optimizer).train_stage2(scenes(), 1)
    assert changed(before, model) == {f"crf.{name}" for name, _ in model.crf.named_parameters()}


def test_stage_3_trains_everything_except_parameters_that_the_user_froze():
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


@pytest.mark.parametrize("seed", [0, 3])
def test_train_piecewise_holds_out_images_for_stage_2(seed):
    """Stage 1 uses no held-out image; stage 2 uses only these, without augmentation; stage 3 uses all. No seed decides
    which images are held out."""
    dataset, asked = load("scenes", "train", size=SIZE, length=12), {True: [], False: []}
    # The augmentation only flips, so that every image which the network receives can be identified.
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
    trainer_of(model, seed=seed).train_piecewise(loader, 1, 1, 1)
    fitted, held, everything = asked[True][:9], asked[False], asked[True][9:]
    # Each held-out image is used twice: for the temperature, and in the epoch.
    assert len(held) == 6 and all(as_it_is for _, as_it_is in held)
    assert not any(as_it_is for _, as_it_is in fitted + everything)
    assert {i for i, _ in fitted}.isdisjoint(i for i, _ in held)
    assert {dataset.names[i] for i, _ in held} == {*hold_out(dataset)[1].names}
    seen = sorted(i for i, _ in fitted + held[:3])
    assert seen == list(range(12)) == sorted(i for i, _ in everything)


def test_a_list_of_batches_serves_as_a_loader(capsys):
    batches = [(torch.rand(2, 3, *SIZE), torch.randint(0, K, (2, *SIZE))) for _ in range(2)]
    history = trainer_of(tiny_model(), progress=None).train_piecewise(batches, 1, 1, 0, val_loader=batches)
    assert [len(history[stage]) for stage in ("stage1", "stage2")] == [1, 2]
    assert "on the images stage 1 was fitted to" in capsys.readouterr().err


def test_a_crf_learns_to_remove_noise():
    """Two flat regions and a unary that errs on a fifth of the pixels. The CRF starts with weights of 0.01 and has to
    learn to smooth."""
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(12, 16, 16, dtype=torch.int64)
    label[:, :, 8:] = 1
    image = torch.where(label[:, None] == 1, 0.8, 0.2).expand(-1, 3, -1, -1).contiguous()
    image[:, :2] = torch.rand(12, 2, 16, 16, generator=generator)

    class Noisy(nn.Module):
        def forward(self, image):
            wrong = image[:, 0] < 0.2  # the red channel is noise, which decides where the unary errs
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


def test_stage_1_can_keep_its_last_epoch(tmp_path):
    """Without a labelled pixel for validation all epochs are equal: "best" keeps the first, "last" the last."""
    val = [(torch.rand(2, 3, *SIZE), torch.full((2, *SIZE), 255))]
    batches = [(torch.rand(2, 3, *SIZE), torch.randint(0, K, (2, *SIZE))) for _ in range(2)]
    kept = {}
    for keeps in ("best", "last"):
        trainer = trainer_of(tiny_model(), stage1_keeps=keeps, out=tmp_path / keeps)
        records = trainer.train_stage1(batches, 3, val_loader=val)["stage1"]
        kept[keeps] = best_record(records, keeps)["epoch"]
        stored = torch.load(tmp_path / keeps / "stage1-best.pt", weights_only=True)
        assert stored["epoch"] == kept[keeps]
        last = torch.load(tmp_path / keeps / "stage1-last.pt", weights_only=True)["model"]
        same = all(torch.equal(value, last[key]) for key, value in trainer.model.state_dict().items())
        assert same == (keeps == "last")
    assert kept == {"best": 1, "last": 3}


def test_the_temperature_is_that_of_a_grid_search():
    """Labels drawn from softmax(z / 2.5): a fine grid, and the true temperature."""
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(20_000, 5, generator=generator)
    label = torch.multinomial(torch.softmax(z / 2.5, 1), 1, generator=generator)[:, 0]
    got = fit_temperature(z, label)
    grid = torch.arange(1.5, 3.5, 0.002)
    searched = grid[torch.stack([nn.functional.cross_entropy(z / t, label) for t in grid]).argmin()].item()
    assert got == pytest.approx(searched, abs=0.003)
    assert got == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize(("labels", "temperature"), [("right", 1 / 20), ("wrong", 20.0), ("none", 1.0)])
def test_a_temperature_without_an_optimum_stays_in_bounds(labels, temperature):
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    label = {"right": z.argmax(1), "wrong": z.argmin(1), "none": None}[labels]
    got = fit_temperature(z[:0], z[:0, 0].long()) if label is None else fit_temperature(z, label)
    assert got == pytest.approx(temperature)


def test_stage_2_uses_the_temperature_fitted_to_its_images(monkeypatch):
    """The logits are twice those that the labels were drawn from, and the CRF is too weak to matter: T = 2."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(8, K, 16, 16, generator=generator)
    label = torch.multinomial(torch.softmax(z, 1).movedim(1, -1).reshape(-1, K), 1, generator=generator)
    crf = DenseCRF(K, w_bilateral=1e-6, w_spatial=1e-6, theta_alpha=2.0, filtering="exact")
    model = PiecewiseTrainedModel(K, unary=Lookup(2 * z), crf=crf)
    image = torch.arange(8.0)[:, None, None, None].expand(8, 3, 16, 16) / 8
    data = DataLoader(TensorDataset(image, label.reshape(8, 16, 16)), batch_size=4)
    trainer = trainer_of(model, crf_learning_rate=1e-9)
    used, forward = [], Objective.forward

    def spy(objective, *batch):
        if torch.is_grad_enabled():  # a training step, not the fit of the temperature itself
            used.append(objective.temperature)
        return forward(objective, *batch)

    monkeypatch.setattr(Objective, "forward", spy)
    trainer.train_stage2(data, 2)
    assert used == pytest.approx([2, 2, 2, 2], abs=0.15)
    # With T = 2 the loss is that of the logits which the labels were drawn from.
    truth = nn.functional.cross_entropy(z, label.reshape(8, 16, 16)).item()
    assert trainer.history["stage2"][-1]["loss"] == pytest.approx(truth, rel=0.01)
    used.clear()
    trainer.train_stage3(data, 1)
    assert used == [1.0, 1.0]


class Lookup(nn.Module):
    """A network with stored logits [8, K, H, W] for the images of constant value i / 8."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, image):
        return self.logits[(image[:, 0, 0, 0] * 8).round().long()]


@pytest.mark.parametrize("keeps", ["best", "last"])
def test_patience_stops_a_stage_that_no_longer_improves(keeps):
    """Epoch 2 scores best; two epochs without a better score end the stage, whichever epoch is kept."""
    scores = iter([0.5, 0.6, 0.6, 0.55, 0.7])
    trainer = trainer_of(tiny_model(), patience=2, stage1_keeps=keeps)
    trainer.evaluate = lambda *_, **__: {"unary": {"miou": next(scores)}}
    records = trainer.train_stage1(scenes(4), 5, scenes(2))["stage1"]
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert best_record(records, keeps)["epoch"] == {"best": 2, "last": 4}[keeps]


def test_patience_needs_a_validation_score():
    with pytest.raises(ValueError, match="patience is 2, but stage 1 has no val_loader"):
        trainer_of(tiny_model(), patience=2).train_stage1(scenes(4), 5)


@pytest.mark.parametrize(("stage", "best"), [(1, 1), (2, 0), (3, 0)])
def test_a_stage_can_be_trained_again(stage, best):
    """As when a notebook cell is run twice: the second call starts anew and keeps the best of its own epochs, even if
    the first call had a better one."""
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


@pytest.mark.parametrize("crf_loss", ["marginal", structured])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_give_the_same_run(crf_loss, dtype):
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
        ((IMAGE, LABEL, ["a", "b"]), "a batch is a tuple of Tensor, Tensor, list"),
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


def test_a_sampler_that_repeats_items_decides_the_length_of_an_epoch():
    dataset = load("scenes", "train", size=SIZE, length=8)
    sampler = RandomSampler(dataset, replacement=True, num_samples=4)
    model, seen = tiny_model(), []
    model.unary.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer_of(model).train_stage1(DataLoader(dataset, batch_size=2, sampler=sampler), 1)
    assert seen == [2, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crf_learning_rate", 0.0),
        ("stage3_factor", -1.0),
        ("clip", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1e-4),
        ("train_iterations", -1),
        ("stage1_keeps", "first"),
    ],
)
def test_invalid_options_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        trainer_of(tiny_model(), **{name: value})


@pytest.mark.parametrize("weights_of", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_class_weights_may_be_a_list(weights_of):
    given = torch.linspace(0.5, 2, K)
    batches = [(IMAGE, torch.arange(K).repeat(2 * SIZE[0] * SIZE[1])[: LABEL.numel()].view_as(LABEL))]
    one, other = (trainer_of(tiny_model(), class_weights=w) for w in (given, weights_of(given)))
    assert one.config == other.config
    assert untimed(one.train_stage1(batches, 1)) == untimed(other.train_stage1(batches, 1))


@pytest.mark.parametrize("loss", ["structured", {"structured": 1.0}, {"cross_entropy": 1.0, "structured": 0.5}])
def test_a_loss_of_the_network_is_cross_entropy_or_a_function(loss):
    with pytest.raises(ValueError, match=r"expected 'cross_entropy' or a function"):
        trainer_of(tiny_model(), loss=loss)


@pytest.mark.parametrize("class_weights", [[-1.0] + [1.0] * (K - 1), [math.nan] * K])
def test_invalid_class_weights_are_named(class_weights):
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
def test_training_restores_the_mode_of_every_module(stage):
    model = tiny_model()
    model.unary.blocks[1].eval()
    before = modes(model)
    assert len(set(before.values())) == 2
    getattr(trainer_of(model), f"train_stage{stage}")(scenes(4), 1, scenes(2))
    assert modes(model) == before


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_batch_norm_keeps_its_statistics(stage):
    """A module is frozen if it is in evaluation mode and none of its parameters requires a gradient. Evaluation mode
    alone is often left over from an earlier evaluation, and the module is trained."""
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


@pytest.mark.parametrize("freeze", [False, True])
def test_freeze_batch_norm_keeps_the_statistics_of_stage_1(freeze):
    model = tiny_model()
    trainer = trainer_of(model, freeze_batch_norm=freeze)
    buffers = {name for name, _ in model.named_buffers() if "running" in name}
    before = weights(model)
    trainer.train_stage1(scenes(4), 1)
    assert changed(before, model) >= buffers
    before, used = weights(model), []
    norm = next(module for module in model.unary.modules() if isinstance(module, nn.BatchNorm2d))

    def observe(norm, inputs, output):
        mean, variance = (t[:, None, None] for t in (norm.running_mean, norm.running_var))
        expected = (inputs[0] - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[
            :, None, None
        ]
        used.append(torch.allclose(output, expected, atol=1e-5))

    norm.register_forward_hook(observe)
    trainer.train_stage3(scenes(4), 1)
    assert used == [freeze]  # whether it normalises by the stored statistics
    names = changed(before, model)
    assert names & buffers == (set() if freeze else buffers)
    assert names >= {name for name, _ in model.unary.named_parameters(prefix="unary") if name.endswith("weight")}


def test_average_stage3_keeps_the_mean_of_start_and_end(monkeypatch):
    """The control is the same stage 3 without averaging; two epochs, of which the second continues from the first."""
    ends, scored = [], []
    for average in (False, True):
        model = tiny_model(dropout=0.0)
        before = weights(model)
        trainer_of(model, average_stage3=average).train_stage3(scenes(4), 2)
        ends.append(weights(model))
    parameters = {name for name, _ in model.named_parameters()}
    for name, end in ends[0].items():
        expected = (before[name] + end) / 2 if name in parameters else end
        torch.testing.assert_close(ends[1][name], expected, atol=1e-7, rtol=1e-6)
    assert changed(ends[0], model) >= {"unary.fc6.0.weight", "crf.log_w"}

    def evaluate(trainer, loader, **options):
        scored.append(weights(trainer.model))
        return {"unary": {"miou": len(scored)}}

    monkeypatch.setattr(PiecewiseTrainer, "evaluate", evaluate)
    model = tiny_model(dropout=0.0)
    trainer_of(model, average_stage3=True).train_stage3(scenes(4), 2, scenes(4))
    assert all(torch.equal(scored[0][name], value) for name, value in before.items())
    assert not changed(scored[-1], model) and not changed(ends[1], model)

    now = weights(model)
    with pytest.raises(KeyboardInterrupt), averaged(model, before):  # interrupted while it is scored
        assert changed(now, model)
        raise KeyboardInterrupt
    assert not changed(now, model)


# ---------------------------------------------------------------------------------------------------- rates, precision


def test_schedules_are_those_of_torch():
    for total in (50, 333):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        poly = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=total, power=0.9)
        for step in range(total):
            assert schedule_factor("poly", step / total) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
            optimizer.step()
            poly.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5000, cycle_momentum=False)
    for step in range(4999):
        assert schedule_factor("onecycle", step / 4999) == pytest.approx(optimizer.param_groups[0]["lr"], abs=2e-3)
        optimizer.step()
        cycle.step()


def test_every_step_has_the_rate_of_the_schedule(monkeypatch):
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


def test_evaluate_counts_every_image_once_with_any_batch_size():
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


def test_evaluate_restores_the_mode_of_every_module():
    model = tiny_model()
    model.unary.eval()
    before = modes(model)
    evaluate(model, [(IMAGE, LABEL)])
    assert modes(model) == before
    with pytest.raises(ValueError, match="a batch is"):
        evaluate(model, [IMAGE])
    assert modes(model) == before


# ----------------------------------------------------------------------------------------------------------- randomness


def test_training_restores_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    trainer_of(tiny := tiny_model_without_seeding()).train_stage1(scenes(4), 1)
    assert torch.equal(torch.rand(3), expected) and tiny is not None


def tiny_model_without_seeding():
    with torch.random.fork_rng([]):
        return tiny_model()
