"""The settings of `train --profile`: for each data set one for two CPU cores ("quick") and one for a GPU ("full")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Profile:
    """The settings of one run. Sizes are (H, W) in px; the bandwidths of the CRF suit images of `size`."""

    size: tuple[int, int] | None  # images are resized to it when loaded; None: not resized, batches are crops
    epochs: tuple[int, int, int]
    batch: int = 8
    crop: tuple[int, int] | None = None  # of training images; None: `size`
    scale: tuple[float, float] = (0.7, 1.2)
    colour: float = 0.2
    width: float = 0.25
    batch_norm: bool = True
    weights: str | None = None  # "imagenet", or a file; see `pwlib.pretrained.read_vgg`
    dropout: float = 0.5
    optimizer: str = "adamw"
    schedule: str = "onecycle"
    learning_rate: float = 3e-3
    crf_learning_rate: float = 0.02
    stage3_factor: float = 0.1
    weight_decay: float = 5e-4
    class_balance: float = 0.5  # class weights are (share of the pixels)^-class_balance; 0: none
    held_out: float = 0.25
    stage1_keeps: str = "best"
    freeze_batch_norm: bool = False  # in stage 3
    average_stage3: bool = False
    crf: dict[str, float | str] = field(default_factory=dict)
    context: dict | None = field(default_factory=lambda: SMALL_CONTEXT)  # used by `train --context`


# `train --context`: options of FeatMap-Net and of the contextual CRF.
SMALL_CONTEXT = {"network": {"output_stride": 8, "dilation": 1}, "crf": {"hidden": 64, "neighbours": 24}}
LARGE_CONTEXT = {"network": {"output_stride": 16}, "crf": {"hidden": 512, "neighbours": 24}}

# The CRF's parameters before training. theta_alpha and theta_gamma in px, theta_beta in grey levels (0 to 255).
SMALL_CRF = {"theta_alpha": 20.0, "theta_beta": 10.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0}
LARGE_CRF = {"theta_alpha": 80.0, "theta_beta": 13.0, "theta_gamma": 3.0, "w_bilateral": 10.0, "w_spatial": 3.0}

_LARGE = Profile(  # DeepLab's settings, with ImageNet weights
    size=None,
    epochs=(40, 5, 10),
    crop=(321, 321),
    width=1.0,
    batch_norm=False,
    weights="imagenet",
    optimizer="sgd",
    schedule="poly",
    learning_rate=1e-3,
    crf_learning_rate=0.1,
    class_balance=0.0,
    crf=LARGE_CRF,
    context=LARGE_CONTEXT,
)

PROFILES: dict[tuple[str, str], Profile] = {
    ("scenes", "quick"): Profile(size=(64, 96), epochs=(12, 2, 1), crf=SMALL_CRF | {"theta_beta": 20.0}),
    ("scenes", "full"): Profile(size=(96, 144), epochs=(60, 8, 10), width=0.5, crf=SMALL_CRF | {"theta_beta": 20.0}),
    ("camvid", "quick"): Profile(
        size=(90, 120),
        epochs=(32, 3, 2),
        scale=(0.7, 1.4),
        dropout=0.1,
        weight_decay=1e-2,
        crf_learning_rate=5e-3,
        crf=SMALL_CRF,
        stage1_keeps="last",
        freeze_batch_norm=True,
        average_stage3=True,
    ),
    ("camvid", "full"): replace(_LARGE, size=(360, 480), crop=None, epochs=(100, 8, 20), class_balance=0.5),
    ("voc2012", "quick"): Profile(size=None, crop=(112, 112), scale=(0.25, 0.4), epochs=(15, 2, 2), crf=SMALL_CRF),
    ("voc2012", "full"): _LARGE,
    ("folder", "quick"): Profile(size=(96, 128), epochs=(40, 4, 4), crf=SMALL_CRF),
    ("folder", "full"): _LARGE,
}


def pretrained(settings: dict, weights: str, *, batch_norm: bool) -> dict:
    """The settings that change if a profile starts from VGG-16's weights: full width, and a smaller learning rate."""
    rate = settings["learning_rate"] if settings["weights"] else 3e-4
    return {"weights": weights, "width": 1.0, "batch_norm": batch_norm, "learning_rate": rate}


def summary() -> str:
    """A table of what each profile sets, for `train --help`."""
    rows = [("data", "profile", "image (crop)", "epochs", "batch", "width", "weights", "rate", "")]
    for (data, name), p in PROFILES.items():
        size = "x".join(map(str, p.size)) if p.size else "({}x{})".format(*p.crop)
        epochs, rate = ",".join(map(str, p.epochs)), f"{p.learning_rate:g}"
        rows.append((data, name, size, epochs, p.batch, p.width, p.weights or "random", rate, p.optimizer))
    return "\n".join("  {:8} {:8} {:13} {:10} {:<5} {:<5} {:9} {:6} {}".format(*row) for row in rows)
