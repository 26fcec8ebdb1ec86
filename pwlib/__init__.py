"""CNN + CRF segmentation you can read: the library under a course on piecewise training of deep structured models.

Read the modules in this order: data, inputs, networks (and pretrained), mean_field, filters, trace, lattice, crf,
losses, graph, context, metrics, model, objective, loaders, checkpoints, evaluation, trainer. Then `tools`,
`annotations` and `cli`, which use them.
"""

__version__ = "0.2.0"

import os

import torch

from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF, Kernel, Trace
from pwlib.data import VOID, load
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, FeatMapNet
from pwlib.tools.dense import dense_crf, probabilities_from_labels
from pwlib.tools.runs import load_run
from pwlib.trainer import PiecewiseTrainer

# A forked process has no threads, and PyTorch's would wait for them forever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

__all__ = [
    "VOID",
    "ContextualCRF",
    "DeepLabLargeFOV",
    "DenseCRF",
    "FeatMapNet",
    "Kernel",
    "PiecewiseTrainedModel",
    "PiecewiseTrainer",
    "Trace",
    "dense_crf",
    "load",
    "load_run",
    "probabilities_from_labels",
]
