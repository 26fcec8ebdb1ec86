"""What the CPU computes, the GPU computes too: the parts of pwlib on a CUDA device beside the same calls on the CPU."""

import copy
import os

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import pwlib
from pwlib import VOID, ContextualCRF, DeepLabLargeFOV, DenseCRF, FeatMapNet, PiecewiseTrainedModel, PiecewiseTrainer
from pwlib.cli.parser import main
from pwlib.data import Augment
from pwlib.tools.tiling import predict

# Another device makes it possible to try the tests themselves where there is no GPU.
DEVICE = torch.device(os.environ.get("PWLIB_TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
BANDWIDTHS = {"theta_alpha": 20.0, "theta_beta": 20.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0}


@pytest.fixture(scope="module")
def problem():
    """Image [1, 3, H, W], label [1, H, W] and random logits [1, 4, H, W]."""
    image, label = pwlib.load("scenes", "val", size=(48, 72))[0]
    logits = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(0))
    return image[None], label[None] % 4, torch.nn.functional.interpolate(logits, (48, 72), mode="bilinear")


def gradients(crf, logits, image, label):
    """Log-marginals, and the gradients of their likelihood: of the logits and of every parameter; on the CPU."""
    logits = logits.detach().requires_grad_()
    log_q = crf(logits, image)
    torch.nn.functional.nll_loss(log_q, label).backward()
    return log_q.detach().cpu(), [t.grad.cpu() for t in (logits, *crf.parameters())]


@pytest.mark.parametrize("normalization", ["symmetric", "row", "none"])
def test_exact_marginals_and_gradients_are_the_cpus(problem, normalization):
    image, label, logits = problem
    weights = {"w_bilateral": 0.01, "w_spatial": 0.01} if normalization == "none" else {}
    crf = DenseCRF(4, filtering="exact", iterations=3, normalization=normalization, **BANDWIDTHS | weights)
    expected, expected_gradients = gradients(crf.double(), logits.double(), image.double(), label)
    crf = copy.deepcopy(crf).float().to(DEVICE)
    crf.zero_grad()
    found, found_gradients = gradients(crf, *(t.to(DEVICE) for t in (logits, image, label)))
    torch.testing.assert_close(found.exp().double(), expected.exp(), rtol=1e-3, atol=1e-4)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert (one.double() - other).norm() <= 1e-2 * other.norm() + 1e-6


def test_exact_marginals_of_many_pixels_are_the_cpus():
    """With more than 16384 pixels, attention on a GPU multiplies numbers of 16 bits where no features are learned."""
    image, label = pwlib.load("scenes", "val", size=(96, 192))[1]
    logits = torch.nn.functional.one_hot(label % 4, 4).movedim(-1, 0)[None].float()
    logits = logits + 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    crf = DenseCRF(4, filtering="exact", iterations=3, **BANDWIDTHS)
    with torch.no_grad():
        expected = crf(logits, image[None]).exp()
        found = copy.deepcopy(crf).to(DEVICE)(logits.to(DEVICE), image[None].to(DEVICE)).exp().cpu()
    assert (found - expected).abs().max() < 5e-3 and (found - expected).abs().mean() < 1e-4


def test_the_lattice_on_the_gpu_is_the_cpus(problem):
    image, label, logits = problem
    crf = DenseCRF(4, filtering="lattice", iterations=3, **BANDWIDTHS)
    expected, expected_gradients = gradients(crf, logits, image, label)
    crf = copy.deepcopy(crf).to(DEVICE)
    crf.zero_grad()
    found, found_gradients = gradients(crf, *(t.to(DEVICE) for t in (logits, image, label)))
    # Rounding may move a point that lies on the border of two simplices: few pixels may differ, not many.
    assert (found.exp() - expected.exp()).abs().mean() < 1e-3
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.995
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-6


def test_the_lattice_handles_a_batch_and_many_labels(problem):
    image, _, _ = problem
    images = torch.cat([image, image.flip(-1), image.flip(-2)]).to(DEVICE)
    logits = torch.randn(3, 40, 48, 72, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    crf = DenseCRF(40, filtering="lattice", iterations=4, **BANDWIDTHS).to(DEVICE)
    with torch.no_grad():
        together = crf(logits, images)
        apart = torch.cat([crf(logits[i : i + 1], images[i : i + 1]) for i in range(3)])
    assert together.device.type == DEVICE.type and together.isfinite().all()
    assert (together.exp() - apart.exp()).abs().mean() < 1e-4


def test_dense_crf_returns_what_it_was_given(problem):
    image, _, logits = problem
    pixels = (255 * image[0]).byte().permute(1, 2, 0)
    p = torch.softmax(logits, 1)[0]
    found = pwlib.dense_crf(pixels.numpy(), p.numpy(), device=DEVICE, filtering="lattice", **BANDWIDTHS)
    expected = pwlib.dense_crf(pixels.numpy(), p.numpy(), device="cpu", filtering="lattice", **BANDWIDTHS)
    assert isinstance(found, np.ndarray) and np.abs(found - expected).mean() < 1e-3
    there = pwlib.dense_crf(pixels, p.to(DEVICE), **BANDWIDTHS)
    assert there.device.type == DEVICE.type


def test_a_trace_is_on_the_cpu(problem):
    image, _, logits = problem
    crf = DenseCRF(4, filtering="exact", **BANDWIDTHS)
    expected = crf.trace(logits, image, iterations=2)
    trace = copy.deepcopy(crf).to(DEVICE).trace(logits.to(DEVICE), image.to(DEVICE), iterations=2)
    assert trace.q.device.type == trace.messages.device.type == "cpu"
    torch.testing.assert_close(trace.q, expected.q, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trace.free_energy, expected.free_energy, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("network", [DeepLabLargeFOV, FeatMapNet])
def test_networks_agree_in_float32_and_in_bfloat16(problem, network):
    torch.manual_seed(0)
    model = network(4, width=0.125).eval()
    image = problem[0]
    with torch.no_grad():
        expected = model(image)
        there = copy.deepcopy(model).to(DEVICE)
        found = there(image.to(DEVICE)).cpu()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            half = there(image.to(DEVICE)).float().cpu()
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 0.01 * scale  # convolutions on a GPU may use TF32
    assert (half - expected).abs().max() < 0.1 * scale


def test_the_contextual_crf_and_its_gradients_are_the_cpus():
    torch.manual_seed(0)
    crf = ContextualCRF(4, 16, hidden=8, neighbours=24).double()
    logits, features = torch.randn(2, 4, 6, 9).double(), torch.randn(2, 16, 6, 9).double()
    label = torch.randint(4, (2, 6, 9))
    results = []
    for device in ("cpu", DEVICE):
        one = copy.deepcopy(crf).to(device)
        log_q = one(logits.to(device), features.to(device))
        loss = torch.nn.functional.nll_loss(log_q, label.to(device))
        (loss + one.pair_loss(logits.to(device), features.to(device), label.to(device))).backward()
        results.append([log_q.detach().cpu(), *(p.grad.cpu() for p in one.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("filtering", ["exact", "lattice"])
@pytest.mark.parametrize("context", [False, True])
def test_all_stages_train_in_mixed_precision_and_resume(tmp_path, filtering, context):
    data = pwlib.load("scenes", "train", size=(48, 72), length=8)
    classes = data.num_classes
    loader = DataLoader(
        data.with_transform(Augment((48, 72))), batch_size=4, shuffle=True, pin_memory=DEVICE.type == "cuda"
    )

    def trainer(resume):
        torch.manual_seed(0)
        unary = DeepLabLargeFOV(classes, width=0.125, batch_norm=True)
        piece = ContextualCRF(classes, unary.feature_channels, hidden=8, neighbours=24) if context else None
        crf = DenseCRF(classes, filtering=filtering, **BANDWIDTHS)
        model = PiecewiseTrainedModel(classes, unary=unary, context=piece, crf=crf)
        options = {"out": tmp_path, "resume": resume, "progress": False, "amp": True}
        return PiecewiseTrainer(model, DEVICE, classes, class_weights=torch.ones(classes), **options)

    history = trainer(False).train_piecewise(loader, 1, 1, 1, val_loader=DataLoader(data, batch_size=3))
    assert [record["epoch"] for record in history["stage3"]] == [0, 1]
    assert all(np.isfinite(record["loss"]) for records in history.values() for record in records if "loss" in record)
    again = trainer(True).train_piecewise(loader, 1, 1, 1, val_loader=DataLoader(data, batch_size=3))
    assert again == history
    stored = torch.load(tmp_path / "stage3-best.pt", weights_only=True)["model"]
    assert all(value.device.type == "cpu" for value in stored.values())


def test_data_and_augmentation_can_be_on_the_device():
    data = pwlib.load("scenes", "train", size=(48, 72), length=3)
    augment = Augment((40, 60), scale=(0.6, 1.4))
    for image, label in data:
        torch.manual_seed(1)
        expected, expected_label = augment(image, label)
        torch.manual_seed(1)
        found, found_label = augment(image.to(DEVICE), label.to(DEVICE))
        assert found.device.type == found_label.device.type == DEVICE.type
        assert (found.cpu() - expected).abs().mean() < 1e-3
        assert (found_label.cpu() == expected_label).float().mean() > 0.99 and (expected_label != VOID).any()


def test_a_prediction_of_the_whole_model_is_the_cpus(problem):
    torch.manual_seed(0)
    model = PiecewiseTrainedModel(
        4, unary=DeepLabLargeFOV(4, width=0.125), crf=DenseCRF(4, filtering="lattice", **BANDWIDTHS)
    )
    expected = predict(model, problem[0][0], short_side=64)
    found = predict(copy.deepcopy(model).to(DEVICE), problem[0][0], short_side=64).cpu()
    assert (found - expected).abs().mean() < 0.02


def test_the_command_line_trains_evaluates_and_predicts(tmp_path, pictures):
    device, run, out = ["--device", DEVICE.type], str(tmp_path / "run"), tmp_path / "out"
    settings = ["--data", "folder", "--root", str(pictures), "--size", "24x36", "--epochs", "1,1,1"]
    assert main(["train", *settings, "--out", run, "--quiet", *device]) == 0
    assert main(["evaluate", run, *device, "--json", str(tmp_path / "scores.json")]) == 0
    photo = next((pictures / "val" / "images").iterdir())
    assert main(["predict", run, str(photo), "--out", str(out), *device]) == 0
    assert (out / f"{photo.stem}-label.png").is_file()
