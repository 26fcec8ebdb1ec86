"""Export the unary network of a run with torch.export (.pt2) or to ONNX (.onnx), for images of any size.

The exported program maps an image, float32 RGB [B, 3, H, W] in [0, 1], to logits [B, K, H, W]; normalisation and the
resize to the image's size are part of it. The CRF is not: `dense_crf` refines the softmax of the logits. Images need at
least 17 px per side (DeepLab-LargeFOV), or 64 px (FeatMap-Net).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from pwlib.tools.runs import Run, load_run

EXAMPLE = (2, 3, 189, 253)  # the shape of the traced image; its sides are no multiple of a cell


class Exported(nn.Module):
    """A unary network without data-dependent checks, for tracing."""

    def __init__(self, unary: nn.Module):
        super().__init__()
        self.unary = unary

    def forward(self, image: Tensor) -> Tensor:
        if not hasattr(self.unary, "coarse"):
            return self.unary(image)
        logits, cell = self.unary.coarse(image), self.unary.cell_size  # [B, K, h, w]
        size = image.shape[-2:] if cell is None else [side * cell for side in logits.shape[-2:]]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        rows, columns = (torch.arange(side, device=image.device) for side in image.shape[-2:])
        return logits.index_select(2, rows).index_select(3, columns)  # a crop, without a condition on the sizes


def export_unary(run: Run, path: str | Path) -> Path:
    """Write the network of a run to a .pt2 or .onnx file, with class names and palette as metadata.

    Returns:
        The file. torch.export.load(file, extra_files={"about.json": ""}) reads a .pt2 file and its metadata.

    Raises:
        ValueError: another suffix, the packages for ONNX are missing, or this version of torch ties a .pt2 program to
            the traced size (2.11 does so for DeepLab-LargeFOV).
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"{path} has the suffix {path.suffix!r}; expected .pt2 (torch.export) or .onnx")
    network = Exported(run.model.unary).eval().cpu()
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    with torch.no_grad():
        program = torch.export.export(network, (torch.rand(EXAMPLE),), dynamic_shapes=shapes)
    about = {"classes": list(run.class_names), "palette": run.palette.tolist(), "short_side": run.short_side}
    if path.suffix == ".pt2":
        try:
            program.module()(torch.rand(1, 3, 64, 98))
        except AssertionError as error:  # a guard on the sizes
            raise ValueError(
                f"torch {torch.__version__} exports this network for images of {EXAMPLE[2]}x{EXAMPLE[3]} px only; "
                "expected the suffix .onnx, or a later version of torch"
            ) from error
        torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    else:
        _save_onnx(program, path, about)
    return path


def _save_onnx(program: torch.export.ExportedProgram, path: Path, about: dict) -> None:
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ValueError("ONNX export needs onnx and onnxscript: pip install onnx onnxscript") from error

    # torch has no translation for this function; 7 is int64.
    table = {torch.sym_max: lambda a, b: op.Max(op.Cast(a, to=7), op.Cast(b, to=7))}
    options = {"input_names": ["image"], "output_names": ["logits"], "custom_translation_table": table}
    result = torch.onnx.export(program, dynamo=True, verbose=False, **options)
    result.model.metadata_props["pwlib"] = json.dumps(about)
    result.save(path)


# -------------------------------------------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of `python -m pwlib export`."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("file", metavar="FILE", help="file to write: NAME.onnx, or NAME.pt2 for torch.export")


def run(args: argparse.Namespace) -> int:
    """Export, and print how the file is used."""
    loaded = load_run(args.run)
    print(f"{export_unary(loaded, args.file)}: image float32 RGB [B, 3, H, W] in [0, 1] -> logits [B, K, H, W]")
    print(f"{len(loaded.class_names)} classes: {', '.join(loaded.class_names)}; the CRF is not part of the file")
    if loaded.short_side:
        print(f"the network was trained on images with a shorter side of {loaded.short_side} px: resize to that first")
    return 0
