"""Measure when a contextual CRF replaces a larger receptive field, and when it lowers the score.

One grid on Scenes: receptive field x model on the cells x dense CRF.

    receptive field    10, 34 and 58 px: one family of networks, one cell per 4 px
                       "whole": DeepLab-LargeFOV at a quarter of VGG's width, one cell per 8 px; sees the whole image
    model              plain           the network alone
                       larger          the same network with as many more parameters as the contextual CRF has
                       tree            network and contextual CRF, trained jointly, counted as a tree
                       reparametrised  the same networks and terms, each term counted by its own marginals
                       ..., fixed      the terms are trained behind the features of "plain", which stay as they are
    dense CRF          none; default parameters; the best of 24 settings; learned (stage 2)

The weight of the pairwise terms is 0, 0.1, 0.25, 0.5 or 1, whichever has the highest mIoU on the validation scenes,
once without and once with the default dense CRF; the search uses the latter's weight. "learned" starts at weight 1 and
learns weights, temperature and dense CRF together. Every choice is made, and stage 2 is trained, on the 40 validation
scenes; 100 test scenes are scored. Training, validation and test scenes are the same for all seeds: a seed decides
initial weights, order and augmentation.

    python benchmarks/context/grid.py --parts plain larger context     25 CPU minutes a seed on one core, eight seeds
    python benchmarks/context/grid.py --parts fixed --fields whole     3 CPU minutes a seed
    python benchmarks/context/grid.py --table                          prints the tables from grid.json

grid.json is written after every training; a command that was stopped continues where it was, and
several processes may share the work.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from study import Study, cell, mean_and_half, parser, settings_searched

from pwlib.context import ContextualCRF
from pwlib.crf import DenseCRF
from pwlib.data import Augment, load
from pwlib.losses import balanced_weights
from pwlib.metrics import SegmentationScores
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV, Normalize, convolution, receptive_field, resize_logits
from pwlib.trainer import PiecewiseTrainer

HERE = Path(__file__).parent
LOOK_ALIKES = ("plane", "boat", "roof", "tent")
FIELDS = {"10": (1, 1), "34": (7, 1), "58": (7, 7), "whole": None}  # sides of the depthwise convolutions
MODELS = ("plain", "larger", "tree", "reparametrised")
FIXED = tuple(f"{model}, fixed" for model in MODELS[2:])
PARTS = ("plain", "larger", "context", "fixed")  # one training each; the last two are scored with both countings
DENSE = ("none", "default", "searched", "learned")
TITLES = {"10": "10 px", "34": "34 px", "58": "58 px", "whole": "LargeFOV"}  # of the receptive fields, in the tables
SCORES = {"miou": "mIoU", "look_alikes": "IoU of the look-alikes", "pixel_accuracy": "accuracy"}
SETTINGS = {
    "train_images": 160,
    "val_images": 40,
    "test_images": 100,
    "epochs": 18,
    "stage2_epochs": 12,
    "batch": 4,
    "channels": 48,
    "hidden": 32,
    "neighbours": 24,
    "learning_rate": 4e-3,
    "crf_learning_rate": 0.05,
    "iterations": 5,
    "weights": [0, 0.1, 0.25, 0.5, 1],
    "crf": {"theta_alpha": 20.0, "theta_beta": 20.0, "theta_gamma": 1.5, "w_bilateral": 3.0, "w_spatial": 1.0},
    "searched": {
        "theta_alpha": [6, 60],
        "theta_beta": [6, 60],
        "theta_gamma": [0.8, 5],
        "w_bilateral": [0.5, 12],
        "w_spatial": [0.1, 5],
    },
    "settings_searched": 24,
}

# ------------------------------------------------------------------------------------------------------------ networks


class LocalNet(nn.Module):
    """A network with one cell per 4 px, whose receptive field is 10 px plus what the depthwise convolutions add.

    sides: of the depthwise convolutions, each followed by a 1x1 convolution; extra: width of a further pair of 1x1
    convolutions, 0 for none.
    """

    cell_size = 4

    def __init__(self, num_classes: int, channels: int, sides: tuple[int, ...], extra: int = 0):
        super().__init__()
        self.feature_channels = channels
        layers = [
            Normalize(),
            *convolution(3, channels // 2, batch_norm=True),
            nn.MaxPool2d(2, ceil_mode=True),
            *convolution(channels // 2, channels, batch_norm=True),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        for side in sides:
            layers.append(nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels))
            layers += convolution(channels, channels, 1, batch_norm=True)
        self.layers = nn.Sequential(*layers, *extra_layers(channels, extra))
        self.head = nn.Conv2d(channels, num_classes, 1)
        self.receptive_field = receptive_field(self.layers)

    def features(self, image: Tensor) -> Tensor:
        return self.layers(image)

    def forward(self, image: Tensor) -> Tensor:
        return resize_logits(self.head(self.features(image)), image.shape[-2:], stride=self.cell_size)


def extra_layers(channels: int, extra: int) -> list[nn.Module]:
    if not extra:
        return []
    return [*convolution(channels, extra, 1, batch_norm=True), *convolution(extra, channels, 1, batch_norm=True)]


def build_network(field: str, classes: int, extra: int = 0) -> nn.Module:
    if FIELDS[field] is not None:
        return LocalNet(classes, SETTINGS["channels"], FIELDS[field], extra)
    network = DeepLabLargeFOV(classes, width=0.25, batch_norm=True, dropout=0.1)
    network.fc7 = nn.Sequential(network.fc7, *extra_layers(network.feature_channels, extra))
    return network


def build(field: str, model: str, classes: int) -> PiecewiseTrainedModel:
    """The model before training; "larger" has as many parameters more than "plain" as the contextual CRF has."""
    unary, context = build_network(field, classes), None
    if model != "plain":
        channels = unary.feature_channels
        context = ContextualCRF(classes, channels, hidden=SETTINGS["hidden"], neighbours=SETTINGS["neighbours"])
    if model == "larger":  # C x extra and extra x C weights; 3 more numbers per output: bias and batch norm
        wanted = count(context) - 3 * channels
        unary, context = build_network(field, classes, round(wanted / (2 * channels + 3))), None
    crf = DenseCRF(classes, filtering="lattice", **SETTINGS["crf"])
    return PiecewiseTrainedModel(classes, SETTINGS["iterations"], unary=unary, context=context, crf=crf)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------------------- scoring


class Scored:
    """The images and labels of a split, and the scores of labels or of logits with a dense CRF behind them."""

    def __init__(self, split: str, length: int):
        dataset = load("scenes", split, length=length)
        self.names = dataset.class_names
        self.image, self.label = (torch.stack(part) for part in zip(*(dataset[i] for i in range(length)), strict=True))

    @torch.no_grad()
    def pixels(self, model: PiecewiseTrainedModel) -> Tensor:
        """Logits, or with a context its log-marginals, at all pixels: [N, K, H, W]."""
        model.eval()
        return torch.cat([list(model.outputs(x, apply_crf=False).values())[-1] for x in self.image.split(10)])

    @torch.no_grad()
    def score(self, scores: Tensor, crf: DenseCRF | None = None) -> dict[str, float]:
        if crf is not None:
            parts = zip(scores.split(10), self.image.split(10), strict=True)
            scores = torch.cat([crf(z, x, iterations=SETTINGS["iterations"]) for z, x in parts])
        found = SegmentationScores(len(self.names), self.names)
        found.update(scores.argmax(1), self.label)
        found = found.result()
        row = {key: round(100 * found[key], 2) for key in ("miou", "pixel_accuracy", "boundary_iou")}
        ious = [found["per_class_iou"][name] for name in LOOK_ALIKES]
        return row | {"look_alikes": round(100 * sum(ious) / len(ious), 2)}


# ---------------------------------------------------------------------------------------------------------------- runs


def train(model: PiecewiseTrainedModel, seed: int, stage: int, counts: Tensor, data) -> PiecewiseTrainer:
    trainer = PiecewiseTrainer(
        model,
        num_classes=model.num_classes,
        learning_rate=SETTINGS["learning_rate"],
        crf_learning_rate=SETTINGS["crf_learning_rate"],
        optimizer="adamw",
        schedule="onecycle",
        joint_pairwise=True,
        context_weights=(),
        class_weights=balanced_weights(counts),
        train_iterations=SETTINGS["iterations"],
        test_iterations=SETTINGS["iterations"],
        seed=seed,
        progress=False,
    )
    loader = DataLoader(data, batch_size=SETTINGS["batch"], shuffle=True)
    getattr(trainer, f"train_stage{stage}")(loader, SETTINGS["epochs" if stage == 1 else "stage2_epochs"])
    return trainer


def run(seed: int, field: str, part: str) -> dict:
    """Train one network with one receptive field, and score it; "context" and "fixed" with both countings."""
    data = load("scenes", "train", length=SETTINGS["train_images"])
    held = load("scenes", "val", length=SETTINGS["val_images"])
    counts = sum(torch.bincount(data[i][1].flatten(), minlength=256)[: data.num_classes] for i in range(len(data)))
    val, test = Scored("val", SETTINGS["val_images"]), Scored("test", SETTINGS["test_images"])
    start, rows = time.process_time(), {}
    torch.manual_seed(seed)
    model = build(field, "plain" if part == "fixed" else part, data.num_classes)
    augment = Augment(scale=(1.0, 1.0), colour=0.0)  # flips only
    history = train(model, seed, 1, counts, data.with_transform(augment)).history["stage1"]
    if part == "fixed":
        model.unary.requires_grad_(False).eval()
        model.context = build(field, "context", data.num_classes).context
        history = train(model, seed, 1, counts, data.with_transform(augment)).history["stage1"]
    about = {
        "parameters": count(model.unary) + (count(model.context) if model.context else 0),
        "loss": [round(record["loss"], 3) for record in history],
        "stage1_minutes": round((time.process_time() - start) / 60, 2),
    }
    for counting in MODELS[2:] if model.context else (None,):
        one, name = copy.deepcopy(model), part
        if counting:
            one.context.counting = counting
            name = f"{counting}, fixed" if part == "fixed" else counting
        rows[name] = about | score_all(one, seed, counts, held, val, test)
        print(f"seed {seed}, field {field}: {name}", flush=True)
    return {"seed": seed, "field": field, "rows": rows, "minutes": round((time.process_time() - start) / 60, 1)}


def score_all(model: PiecewiseTrainedModel, seed: int, counts: Tensor, held, val: Scored, test: Scored) -> dict:
    """Score a network (and its context) without a dense CRF and with each of the three kinds."""
    found, default = {}, model.crf
    weights = SETTINGS["weights"] if model.context else [None]
    logits = {}
    for weight in weights:
        if weight is not None:
            model.context.weight.data.fill_(weight)
        logits[weight] = val.pixels(model), test.pixels(model)
    sweep = {
        dense: {w: (val.score(v, crf), test.score(t, crf)) for w, (v, t) in logits.items()}
        for dense, crf in (("none", None), ("default", default))
    }
    for dense, by_weight in sweep.items():
        best = max(weights, key=lambda w: by_weight[w][0]["miou"])
        found[dense] = by_weight[best][1] | ({} if best is None else {"weight": best})
        if model.context:
            found[f"sweep, {dense}"] = {str(w): [v["miou"], t["miou"]] for w, (v, t) in by_weight.items()}
    on_val, on_test = logits[found["default"].get("weight")]
    searched = settings_searched(SETTINGS["crf"], SETTINGS["searched"], SETTINGS["settings_searched"])
    crfs = [(DenseCRF(model.num_classes, filtering="lattice", **some), some) for some in searched]
    crf, some = max(crfs, key=lambda one: val.score(on_val, one[0])["miou"])
    found["searched"] = test.score(on_test, crf) | {"parameters": some}
    if model.context:
        model.context.weight.data.fill_(1.0)
    history = train(model, seed, 2, counts, held).history["stage2"]
    found["learned"] = test.score(test.pixels(model), model.crf)
    found["learned"]["loss"] = [round(record["loss"], 4) for record in history]
    if model.context:
        found["learned"]["weights"] = [round(w, 3) for w in model.context.weight.clamp(min=0).tolist()]
        found["learned"]["temperature"] = round(model.context.log_temperature.exp().item(), 3)
        found["learned"]["without dense CRF"] = test.score(test.pixels(model))["miou"]
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def complete(runs: dict[str, dict]) -> dict[str, list[dict]]:
    """The rows {model: ...} of the seeds of which everything is stored, by receptive field."""
    found: dict = {field: {} for field in FIELDS}
    for run in runs.values():
        found[run["field"]].setdefault(run["seed"], {}).update(run["rows"])
    found = {field: [seeds[s] for s in sorted(seeds) if not {*MODELS} - {*seeds[s]}] for field, seeds in found.items()}
    return {field: rows for field, rows in found.items() if rows}


def models_of(rows: list[dict]) -> list[str]:
    """The models that are stored for all seeds."""
    return [model for model in (*MODELS, *FIXED) if all(model in row for row in rows)]


def changes(one: list[dict], other: list[dict], key: str = "miou") -> list[str]:
    """What the first rows have more than the others, paired by seed, with each dense CRF.

    In parentheses if the interval contains 0.
    """
    result = []
    for dense in DENSE:
        values = [a[dense][key] - b[dense][key] for a, b in zip(one, other, strict=True)]
        mean, half = mean_and_half(values)
        text = cell(values, sign=True)
        result.append(f"({text})" if abs(mean) <= half else text)
    return result


def learned_weights(rows: list[dict]) -> str:
    """The range of the learned weights over seeds and relations."""
    weights = [weight for row in rows for weight in row["learned"].get("weights", [])]
    return f"{min(weights):.2f} to {max(weights):.2f}" if weights else ""


def summary(found: dict[str, list[dict]]) -> str:
    """Markdown: the README's tables, the first for LargeFOV and the second for the smaller networks."""
    of = {(field, model): [row[model] for row in rows] for field, rows in found.items() for model in models_of(rows)}
    lines = []

    def start(title: str) -> None:
        lines.extend(["", f"| {title} | no dense CRF | default | searched | learned | learned weights |"])
        lines.append("|---|" + "--:|" * (len(DENSE) + 1))

    def plain(field: str, title: str) -> None:
        cells = [cell([row[dense]["miou"] for row in of[field, "plain"]]) for dense in DENSE]
        lines.append(f"| {title} | {' | '.join(cells)} |  |")

    def minus(one: tuple[str, str], other: tuple[str, str], title: str) -> None:
        if one in of and other in of and len(of[one]) == len(of[other]):
            lines.append(f"| {title} | {' | '.join(changes(of[one], of[other]))} | {learned_weights(of[one])} |")

    if "whole" in found:
        start("DeepLab-LargeFOV, mIoU")
        plain("whole", "plain network")
        for model in (*MODELS[2:], *FIXED):
            kind = "fixed features" if model in FIXED else "trained together"
            minus(("whole", model), ("whole", "plain"), f"{kind}: {model.removesuffix(', fixed')} - plain")
    if set(found) - {"whole"}:
        start("smaller networks, mIoU")
    for field in (field for field in found if field != "whole"):
        plain(field, f"{TITLES[field]}: plain network")
        for model in MODELS[2:]:
            minus((field, model), (field, "plain"), f"{TITLES[field]}: {model} - plain")
        if field == "10":
            minus(("10", "tree"), ("10", "larger"), "10 px: tree - larger")
            for more in ("34", "58"):
                minus((more, "plain"), ("10", "tree"), f"plain, {TITLES[more]} - tree, 10 px")
    return "\n".join(lines[1:])


def table(found: dict[str, list[dict]], key: str = "miou") -> str:
    """Markdown: the scores of the grid, and what the contextual CRF adds to each of its controls."""
    lines = []
    lines.append(f"| {SCORES[key]}, test scenes | model | parameters | seeds | " + " | ".join(DENSE) + " |")
    lines.append("|---|---|--:|--:|" + "--:|" * len(DENSE))
    for field, rows in found.items():
        for model in models_of(rows):
            cells = [cell([row[model][dense][key] for row in rows]) for dense in DENSE]
            size = f"{rows[0][model]['parameters'] / 1000:.0f} k"
            lines.append(f"| {TITLES[field]} | {model} | {size} | {len(rows)} | " + " | ".join(cells) + " |")
    lines += ["", f"| {SCORES[key]}, difference by seed | model | control | " + " | ".join(DENSE) + " |"]
    lines.append("|---|---|---|" + "--:|" * len(DENSE))
    joint = {control: [] for control in MODELS[:2]}  # differences of models trained together, 34 px or more
    for field, rows in found.items():
        for model, control in (("larger", "plain"), *itertools.product(models_of(rows)[2:], MODELS[:2])):
            cells = changes([row[model] for row in rows], [row[control] for row in rows], key)
            lines.append(f"| {TITLES[field]} | {model} | {control} | " + " | ".join(cells) + " |")
            if field != "10" and model in MODELS[2:]:
                joint[control] += cells
    for control, cells in joint.items():
        below, above = (sum(text.startswith(sign) for text in cells) for sign in "-+")
        lines += ["", f"Trained together, 34 px or more, minus {control}: of {len(cells)} intervals, "]
        lines[-1] += f"{below} lie below 0 and {above} above."
    return "\n".join(lines)


def weights_table(found: dict[str, list[dict]]) -> str:
    """Markdown: test mIoU at each weight of the pairwise terms, and the weights that were selected and learned.

    "0 - plain" is what training with the terms changes in the network itself; "1 - 0" is what they change at weight 1.
    """
    weights = [str(w) for w in SETTINGS["weights"]]
    lines = [f"| field | counting | dense CRF | {' | '.join(weights)} | 0 - plain | 1 - 0 | selected | learned |"]
    lines.append("|---|---|---|" + "--:|" * (len(weights) + 2) + "---|---|")
    for field, rows in found.items():
        for model in models_of(rows)[2:]:
            for dense in ("none", "default"):
                sweeps = [{w: v[1] for w, v in row[model][f"sweep, {dense}"].items()} for row in rows]
                cells = [cell([sweep[w] for sweep in sweeps]) for w in weights]
                changes = [sweep["0"] - row["plain"][dense]["miou"] for sweep, row in zip(sweeps, rows, strict=True)]
                cells.append(cell(changes, sign=True))
                cells.append(cell([sweep["1"] - sweep["0"] for sweep in sweeps], sign=True))
                selected = ", ".join(f"{row[model][dense]['weight']:g}" for row in rows)
                learned = ", ".join("/".join(f"{w:.2f}" for w in row[model]["learned"]["weights"]) for row in rows)
                title = TITLES[field]
                lines.append(f"| {title} | {model} | {dense} | {' | '.join(cells)} | {selected} | {learned} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__, HERE / "grid.json")
    arguments.add_argument("--fields", choices=tuple(FIELDS), nargs="+", default=list(FIELDS))
    arguments.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    given = arguments.parse_args()
    study = Study(given.out, SETTINGS)
    if not given.table:
        for seed, field, part in itertools.product(given.seeds, given.fields, given.parts):
            key = f"seed {seed}, field {field}, {part}"
            if key not in study.runs:
                study.add(key, run(seed, field, part))
    found = complete(study.runs)
    print(summary(found), end="\n\n")
    for key in SCORES:
        print(table(found, key), end="\n\n")
    print(weights_table(found))


if __name__ == "__main__":
    main()
