"""The exported network gives the logits of the original one, for other batch sizes and image sizes."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pwlib import DeepLabLargeFOV, FeatMapNet, PiecewiseTrainedModel
from pwlib.cli.parser import main
from pwlib.data import voc_palette
from pwlib.tools.export import export_unary
from pwlib.tools.runs import Run

SIZES = [(1, 64, 64), (3, 65, 97), (1, 120, 80), (2, 200, 333)]
NETWORKS = {
    "DeepLab-LargeFOV": lambda: DeepLabLargeFOV(4, width=1 / 32, batch_norm=True),
    "FeatMap-Net": lambda: FeatMapNet(4, width=1 / 64, output_stride=8, dilation=1),
    "another network": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
}


def run_of(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 4:
            nn.init.normal_(layer.weight)  # logits of order 1
    model = PiecewiseTrainedModel(4, unary=network).eval()
    return Run(model, ("sky", "sea", "land", "boat"), voc_palette(4), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_the_exported_network_agrees_at_every_size(name, suffix, tmp_path):
    if suffix == ".onnx":
        onnxruntime = pytest.importorskip(
            "onnxruntime", reason="onnxruntime is not installed (pip install '.[export]')"
        )
        pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install '.[export]')")
    run = run_of(name)
    if torch.__version__ < "2.12" and (name, suffix) == ("DeepLab-LargeFOV", ".pt2"):
        with pytest.raises(ValueError, match="exports this network for images of 189x253 px only"):
            export_unary(run, tmp_path / f"net{suffix}")
        return
    path = export_unary(run, tmp_path / f"net{suffix}")
    if suffix == ".pt2":
        extra = {"about.json": ""}
        program = torch.export.load(path, extra_files=extra).module()
        about = json.loads(extra["about.json"])
    else:
        session = onnxruntime.InferenceSession(path)
        about = json.loads(session.get_modelmeta().custom_metadata_map["pwlib"])

        def program(image):
            return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])

    assert about["classes"] == list(run.class_names) and np.array_equal(about["palette"], run.palette)
    for batch, height, width in SIZES:
        image = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = run.model.unary_logits(image)
        scale = expected.abs().max().item()
        assert 0.1 < scale < 1e4
        # onnxruntime's antialiased resize, which FeatMap-Net needs, differs slightly from torch's.
        tolerance = 1e-3 if (name, suffix) == ("FeatMap-Net", ".onnx") else 1e-4
        torch.testing.assert_close(program(image), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.slow
def test_the_command(finished, tmp_path, capsys):
    assert main(["export", str(finished[0]), str(tmp_path / "net.pt2")]) == 0
    out = capsys.readouterr().out
    assert "the CRF is not part of the file" in out and "shorter side of 24 px" in out
    torch.export.load(tmp_path / "net.pt2")
    assert main(["export", str(finished[0]), str(tmp_path / "net.tflite")]) == 2
    assert "expected .pt2 (torch.export) or .onnx" in capsys.readouterr().err
    assert main(["export", str(finished[0]), str(tmp_path / "missing" / "net.onnx")]) == 2
    assert "expected the name of a file in an existing folder" in capsys.readouterr().err


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        export_unary(run_of("another network"), tmp_path / "net.onnx")
