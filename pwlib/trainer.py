"""Training in three stages, and the evaluation that goes with it.

    stage 1   the unary network alone                                          on the training images
    stage 2   the CRFs alone, on the frozen network's logits                   on images stage 1 was not fitted to
    stage 3   everything together, in smaller steps                            on the training images

"Piecewise" means two things, and both are here. Stage by stage: CRF-as-RNN (Zheng et al., ICCV 2015) and DeepLab train
that way. Piece by piece: `crf_loss="piecewise"` learns the CRF in stage 2 from locally normalised potentials, without
inference (Sutton & McCallum 2005; Lin et al., CVPR 2016). The default, "marginal", is the likelihood of the labels
under mean field's marginals.

Why stage 2 has images of its own: on those the network was fitted to it hardly errs, so there is nothing for a CRF to
correct, and it learns that it is not needed. Why it has no class weights: they ask for a prior that the pixels do not
have, and the CRF, which sees whole regions, follows it further than a network does. Why its likelihood has a
temperature: see `pwlib.objective.Objective`.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from pwlib import checkpoints, loaders
from pwlib.data import VOID, SegmentationDataset, hold_out
from pwlib.evaluation import best_record, evaluate
from pwlib.loaders import Batches
from pwlib.losses import check_class_weights, make_loss
from pwlib.metrics import ConfusionMatrix
from pwlib.model import PiecewiseTrainedModel, kept_modes
from pwlib.objective import CRF_LOSSES, SCHEDULES, Objective, calibrated, frozen_modules, rate

OPTIMIZERS = ("sgd", "adamw")
CRF_LEARNING_RATE = {"sgd": 0.1, "adamw": 0.02}

History = dict[str, list[dict[str, Any]]]


class PiecewiseTrainer:
    """Trains a `PiecewiseTrainedModel` stage by stage.

    Args:
        model, device, num_classes: what is trained, where, and K (checked against the model's).
        learning_rate: of the network in stage 1; `crf_learning_rate`: of the CRF in stage 2, whose parameters are
            logarithms and penalties of order 1 (None: 0.1 for SGD, 0.02 for AdamW). In stage 3 both times
            `stage3_factor`.
        optimizer: "sgd" (momentum 0.9) or "adamw"; schedule: "poly", "onecycle" or "constant", over each stage.
        weight_decay: on the network's weights; never on biases, norms or the CRF.
        loss: the network's, a name, names with weights, or a function (see `pwlib.losses.make_loss`); class_weights [K]
            act on it alone, and on a context's pieces. crf_loss: "marginal" or "piecewise", in stage 2.
        joint_pieces: whether stage 1 trains the model's context with the network, as the paper does; stage 2 then
            learns how much its pieces count, and leaves them as they are. If not, they are learned in stage 2 on the
            network's frozen features.
        clip: largest norm of the gradient (None: any).
        train_iterations, test_iterations: mean field's; fewer in training cost less and learn as well.
        held_out: share of the training set kept for stage 2, where no `crf_loader` is given.
        stage1_keeps: "best", or "last": under a rate that falls to nothing the last epoch is the one that has settled,
            and an earlier peak on the validation split is partly luck.
        patience: stop a stage after so many epochs without a better validation score (None: never).
        out: folder for checkpoints, history.json (None: keep all in memory). resume: go on with what `out` holds.
        seed: of order, dropout and augmentation. An epoch's randomness depends on (seed, stage, epoch) only; transforms
            are to draw from torch's global generator, as torchvision's and `Augment()` do.
        amp: mixed precision for the network (None: on a GPU); the CRF is always computed in float32.
        progress: True, False, or None: bars on a terminal. Unless False, a line for each epoch.

    `history` maps "stage1", "stage2", "stage3" to one dict an epoch, ready for JSON: epoch, loss, miou (of the training
    batches), learning_rate, seconds, images_per_second, and "val": {"unary": scores, "crf": scores} if there is a
    val_loader. Stages 2 and 3 start with an epoch 0, the scores before the first step: it competes for the best.

    The best epoch of each stage, by validation mIoU (of the CRF, in stages 2 and 3), is what the next one starts from,
    and what the model holds at the end; without a val_loader it is the last. Under torchrun with an initialised process
    group the loaders' batch sizes are per process.
    """

    def __init__(
        self,
        model: PiecewiseTrainedModel,
        device: torch.device | str = "cpu",
        num_classes: int = 21,
        learning_rate: float = 1e-3,
        *,
        crf_learning_rate: float | None = None,
        stage3_factor: float = 0.1,
        optimizer: str = "sgd",
        schedule: str = "poly",
        weight_decay: float = 5e-4,
        loss: str | Mapping[str, float] | Callable = "cross_entropy",
        crf_loss: str = "marginal",
        joint_pieces: bool = False,
        class_weights: Tensor | Sequence[float] | None = None,
        clip: float | None = 5.0,
        train_iterations: int = 5,
        test_iterations: int = 10,
        held_out: float = 0.25,
        stage1_keeps: str = "best",
        patience: int | None = None,
        out: str | Path | None = None,
        resume: bool = False,
        seed: int = 0,
        amp: bool | None = None,
        progress: bool | None = None,
    ):
        _one_of("optimizer", optimizer, OPTIMIZERS)
        _one_of("schedule", schedule, SCHEDULES)
        _one_of("crf_loss", crf_loss, CRF_LOSSES)
        _one_of("stage1_keeps", stage1_keeps, ("best", "last"))
        if num_classes != model.num_classes:
            raise ValueError(f"num_classes is {num_classes}; the model has {model.num_classes}")
        class_weights = None if class_weights is None else check_class_weights(class_weights, num_classes)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate is {learning_rate}; expected a positive number")
        if patience is not None and patience < 1:
            raise ValueError(f"patience is {patience}; expected at least 1 epoch, or None")
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.num_classes = num_classes
        options = {} if class_weights is None or callable(loss) else {"class_weights": class_weights.to(self.device)}
        self.class_weights = None if class_weights is None else class_weights.to(self.device)
        self.loss = make_loss(loss, **options)
        crf_learning_rate = CRF_LEARNING_RATE[optimizer] if crf_learning_rate is None else crf_learning_rate
        # What decides the run: kept in every checkpoint, compared when one is resumed.
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "learning_rate": learning_rate,
            "crf_learning_rate": crf_learning_rate,
            "stage3_factor": stage3_factor,
            "optimizer": optimizer,
            "schedule": schedule,
            "weight_decay": weight_decay,
            "loss": dict(loss) if isinstance(loss, Mapping) else loss if isinstance(loss, str) else "a function",
            "crf_loss": crf_loss,
            "class_weights": None if class_weights is None else [float(w) for w in class_weights],
            "clip": clip,
            "train_iterations": train_iterations,
            "test_iterations": test_iterations,
            "held_out": held_out,
            "stage1_keeps": stage1_keeps,
            "patience": patience,
            "seed": seed,
        }
        if model.context is not None:
            self.config["joint_pieces"] = joint_pieces
        self.joint_pieces = joint_pieces
        self.amp = self._precision(amp)
        self.progress = progress
        self.resume = resume
        self.out = None if out is None else Path(out)
        self.history: History = {}
        if self.out is not None:
            if not resume and any(self.out.glob("stage*.pt")):
                raise FileExistsError(f"{self.out} holds a run already; resume it, or choose another folder")
            self.out.mkdir(parents=True, exist_ok=True)

    def _precision(self, amp: bool | None) -> torch.dtype | None:
        if not (self.device.type == "cuda" if amp is None else amp):
            return None
        if self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16

    # ------------------------------------------------------------------------------------------------------- stages

    def train_piecewise(
        self,
        train_loader: Batches,
        stage1_epochs: int = 20,
        stage2_epochs: int = 5,
        stage3_epochs: int = 10,
        val_loader: Batches | None = None,
        crf_loader: Batches | None = None,
    ) -> History:
        """All three stages; a stage of 0 epochs is left out. Returns `history`.

        Without a `crf_loader`, and if `train_loader` is over a `SegmentationDataset`, a share of that set is held out
        for stage 2 (whole drives or sequences, where the set names them), without the training transform, and stage 1
        is fitted to the rest; stage 3 uses all. Over any other data set stage 2 uses the training images, and says so.
        """
        fit_loader = train_loader
        if stage2_epochs and crf_loader is None:
            dataset = getattr(train_loader, "dataset", None)
            if isinstance(dataset, SegmentationDataset):
                fit, held = hold_out(dataset, self.config["held_out"], self.config["seed"])
                fit_loader = loaders.rebuilt(train_loader, dataset=fit)
                crf_loader = loaders.rebuilt(train_loader, dataset=held.with_transform(None))
            else:
                self._say("stage 2 will learn the CRF on the images stage 1 was fitted to: give crf_loader= for better")
                crf_loader = train_loader
        self.train_stage1(fit_loader, stage1_epochs, val_loader)
        self.train_stage2(crf_loader, stage2_epochs, val_loader)
        return self.train_stage3(train_loader, stage3_epochs, val_loader)

    def train_stage1(self, train_loader: Batches, epochs: int = 20, val_loader: Batches | None = None) -> History:
        """The unary network alone."""
        return self._stage(1, train_loader, epochs, val_loader)

    def train_stage2(self, crf_loader: Batches, epochs: int = 5, val_loader: Batches | None = None) -> History:
        """The CRF alone; the network, batch-norm statistics included, stays bit for bit what it is."""
        return self._stage(2, crf_loader, epochs, val_loader)

    def train_stage3(self, train_loader: Batches, epochs: int = 10, val_loader: Batches | None = None) -> History:
        """Network and CRF together, in smaller steps."""
        return self._stage(3, train_loader, epochs, val_loader)

    def _stage(self, stage: int, loader: Batches, epochs: int, val_loader: Batches | None) -> History:
        if epochs < 0:
            raise ValueError(f"stage {stage} has {epochs} epochs; expected 0 or more")
        if epochs == 0:
            return self.history
        if not hasattr(loader, "__len__"):
            raise ValueError(
                f"stage {stage} was given a {type(loader).__name__}, which has no length; "
                "expected a DataLoader or a list of batches"
            )
        if self.config["patience"] and val_loader is None:
            raise ValueError(
                f"patience is {self.config['patience']}, but stage {stage} has no val_loader whose score could improve"
            )
        loader = loaders.rebuilt(loader)
        if len(loader) == 0:
            raise ValueError(f"stage {stage} has no batch to train on: the loader is empty")
        fixed = self._parts(stage, trained=False)
        if stage == 2 and self.joint_pieces and self.model.context is not None:
            fixed.append(self.model.context.networks)
        frozen = [p for part in fixed for p in part.parameters() if p.requires_grad]
        objective = self._objective(stage)
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            with kept_modes(self.model):
                self._fit(stage, objective, loader, epochs, val_loader)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
        return self.history

    def _objective(self, stage: int) -> Objective:
        config = self.config
        objective = Objective(
            self.model,
            stage,
            self.loss,
            config["crf_loss"],
            config["train_iterations"],
            self.amp,
            self.class_weights,
            self.joint_pieces,
        )
        if self.model.training:  # as a whole; else evaluation mode is what an earlier evaluation left
            objective.frozen = frozen_modules(self.model)
        return objective

    def _fit(self, stage: int, objective: Objective, loader: Batches, epochs: int, val_loader: Batches | None) -> None:
        name = f"stage{stage}"
        optimizer = self._optimizer(stage)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        plan = {"config": self.config, "epochs": epochs, "batches": len(loader)}
        last = self._last(name, plan)
        if last is not None:
            optimizer.load_state_dict(last["optimizer"])
            scaler.load_state_dict(last["scaler"])
            self.history = last["history"]
        else:
            self.history[name] = []
        records = self.history.setdefault(name, [])
        best = self._best(name, last)

        def keep(optimizer_too: bool) -> None:
            nonlocal best
            if stage == 1 and self.config["stage1_keeps"] == "last":
                for record in records:
                    record.pop("kept", None)
                records[-1]["kept"] = True
            if best_record(records) is records[-1]:
                best = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
                self._save(f"{name}-best.pt", {**plan, "epoch": records[-1]["epoch"], "model": best})
            if optimizer_too:
                state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"scaler": scaler.state_dict(), "history": self.history, "epoch": records[-1]["epoch"]}
                self._save(f"{name}-last.pt", {**plan, **state})

        if not records and stage > 1 and val_loader is not None:
            records.append({"epoch": 0, "val": self.evaluate(val_loader)})
            self._say_epoch(stage, epochs)
            keep(optimizer_too=False)
        module = objective
        if loaders.process()[1] > 1:
            module = DistributedDataParallel(objective)
        for epoch in range(last["epoch"] + 1 if last else 1, epochs + 1):
            if self._out_of_patience(records):
                break
            if stage == 2 and self.config["crf_loss"] == "marginal":
                objective.temperature = self._temperature(objective, loader)
            seed = loaders.derive_seed(self.config["seed"], stage, epoch)
            loaders.start_epoch(loader, seed)
            with loaders.seeded(seed + loaders.process()[0], self.device):
                record = self._epoch(module, optimizer, scaler, loader, stage, epoch, epochs)
            if val_loader is not None:
                record["val"] = self.evaluate(val_loader, apply_crf=stage > 1)
            records.append(record)
            self._say_epoch(stage, epochs)
            keep(optimizer_too=True)
        self.model.load_state_dict(best)

    @torch.no_grad()
    def _temperature(self, objective: Objective, loader: Batches, batches: int = 4) -> float:
        """What to divide the log-marginals by, as a few of stage 2's batches have it; the same few in every epoch."""
        seed = loaders.derive_seed(self.config["seed"], 2, 0)
        loaders.start_epoch(loader, seed)
        rows, labels = [], []
        with loaders.seeded(seed + loaders.process()[0], self.device):
            for batch in itertools.islice(loader, batches):
                image, label = loaders.read_batch(batch, self.device)
                log_q = objective.train()(image, label)[1].movedim(1, -1)
                rows.append(log_q[label != VOID])
                labels.append(label[label != VOID])
        return calibrated(torch.cat(rows), torch.cat(labels))

    def _epoch(self, module, optimizer, scaler, loader, stage: int, epoch: int, epochs: int) -> dict[str, Any]:
        module.train()
        confusion = ConfusionMatrix(self.num_classes, device=self.device)
        total = torch.zeros(2, device=self.device, dtype=torch.float64)  # loss times weight, weight
        start, seen, peak = time.perf_counter(), 0, 0.0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self._bar(loader, f"stage {stage} {epoch}/{epochs}") as bar:
            for step, batch in enumerate(bar):
                image, label = loaders.read_batch(batch, self.device)
                share = rate(self.config["schedule"], (epoch - 1 + step / len(loader)) / epochs)
                for group in optimizer.param_groups:
                    group["lr"] = share * group["peak"]
                peak = max(peak, optimizer.param_groups[0]["lr"])
                loss, scores = _step(module, image, label)
                mine, everyones = self._weight(label, stage)
                optimizer.zero_grad(set_to_none=True)
                # DistributedDataParallel averages gradients over processes; one process would average over pixels.
                scaler.scale(loss * (mine * loaders.process()[1] / everyones)).backward()
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss is {value} in stage {stage}, epoch {epoch}, step {step + 1}; "
                        "expected a finite number: try a smaller learning rate"
                    )
                scaler.unscale_(optimizer)
                if self.config["clip"] is not None:
                    nn.utils.clip_grad_norm_(parameters, self.config["clip"])
                scaler.step(optimizer)
                scaler.update()
                confusion.update(scores.detach().argmax(1), label)
                total += torch.stack([loss.detach().double() * mine, mine.double()])
                seen += len(image)
                if not bar.disable:
                    miou = float(confusion.scores()["miou"])
                    bar.set_postfix(loss=f"{total[0] / total[1]:.3f}", mIoU=f"{miou:.3f}", lr=f"{peak:.1e}")
        if loaders.process()[1] > 1:
            torch.distributed.all_reduce(total)
            for buffer in self.model.buffers():  # every process evaluates with the first one's batch-norm statistics
                torch.distributed.broadcast(buffer, 0)
        if not total[1] > 0:
            raise ValueError(f"not one labelled pixel in epoch {epoch} of stage {stage}: all labels are {VOID} (void)")
        seconds = time.perf_counter() - start
        miou = float(confusion.all_reduce().scores()["miou"])
        return {
            "epoch": epoch,
            "loss": float(total[0] / total[1]),
            "miou": None if math.isnan(miou) else miou,
            "learning_rate": peak,
            "seconds": round(seconds, 3),
            "images_per_second": round(seen * loaders.process()[1] / seconds, 2),
        }

    def evaluate(self, loader: Batches, *, apply_crf: bool = True) -> dict[str, Any]:
        """Scores of the model as it is: see `evaluate`."""
        iterations, bar = self.config["test_iterations"], self._bar
        return evaluate(
            self.model, loader, apply_crf=apply_crf, iterations=iterations, bar=lambda it: bar(it, "scoring")
        )

    # -------------------------------------------------------------------------------------------------------- parts

    def _parts(self, stage: int, trained: bool) -> list[nn.Module]:
        names = {1: {"unary"}, 2: {"context", "crf"}, 3: {"unary", "context", "crf"}}[stage]
        names |= {"context"} if self.joint_pieces else set()
        parts = {name: getattr(self.model, name) for name in ("unary", "context", "crf")}
        return [part for name, part in parts.items() if part is not None and (name in names) == trained]

    def _optimizer(self, stage: int) -> torch.optim.Optimizer:
        """Groups with their peak rates: the network's weights (with decay), its other parameters, and the CRF's."""
        config = self.config
        factor = config["stage3_factor"] if stage == 3 else 1.0
        decay, plain, crf = [], [], []
        for part in self._parts(stage, trained=True):
            for name, parameter in part.named_parameters():
                if parameter.requires_grad:
                    of_crf = part is self.model.crf or (part is self.model.context and name.startswith("log_"))
                    (crf if of_crf else decay if parameter.ndim > 1 else plain).append(parameter)
        groups = [
            {"params": decay, "peak": factor * config["learning_rate"], "weight_decay": config["weight_decay"]},
            {"params": plain, "peak": factor * config["learning_rate"], "weight_decay": 0.0},
            {"params": crf, "peak": factor * config["crf_learning_rate"], "weight_decay": 0.0},
        ]
        groups = [{**group, "lr": group["peak"]} for group in groups if group["params"]]
        if not groups:
            raise ValueError(f"stage {stage} has nothing to train: no parameter wants a gradient")
        return torch.optim.AdamW(groups) if config["optimizer"] == "adamw" else torch.optim.SGD(groups, momentum=0.9)

    def _weight(self, label: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """How much this process's batch counts, and all processes' together: the sum of its pixels' weights."""
        pixels = label[label != VOID]
        weighted = stage == 1 and self.class_weights is not None
        mine = self.class_weights[pixels].sum() if weighted else torch.tensor(float(len(pixels)), device=label.device)
        everyones = mine.clone()
        if loaders.process()[1] > 1:
            torch.distributed.all_reduce(everyones)
        return mine, everyones.clamp(min=1e-12)

    def _out_of_patience(self, records: list[dict[str, Any]]) -> bool:
        patience = self.config["patience"]
        best = best_record(records, validated=True) if records else None
        return bool(patience and best and records[-1]["epoch"] - best["epoch"] >= patience)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if self.out is not None and loaders.process()[0] == 0:
            checkpoints.save(self.out / name, state)
            checkpoints.save_json(self.out / "history.json", self.history)

    def _last(self, name: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """The stage's last checkpoint, if this run resumes one; ValueError if it was made under another plan."""
        if self.out is None or not self.resume or not (self.out / f"{name}-last.pt").exists():
            return None
        path = self.out / f"{name}-last.pt"
        state = checkpoints.load_model(path, self.model)
        for key in [*self.config, "epochs", "batches"]:
            there, here = ({**side, **side["config"]}.get(key) for side in (state, plan))
            if there != here:
                raise ValueError(f"{path} was made with {key} = {there}, this run has {here}: it cannot be resumed")
        return state

    def _best(self, name: str, last: dict[str, Any] | None) -> dict[str, Tensor]:
        if last is None:
            return {}
        return checkpoints.load(self.out / f"{name}-best.pt")["model"]

    # ----------------------------------------------------------------------------------------------------- progress

    def _bar(self, batches: Batches, text: str = "scoring") -> tqdm:
        hidden = True if self.progress is False or loaders.process()[0] else None if self.progress is None else False
        return tqdm(batches, desc=text, unit="batch", leave=False, disable=hidden)

    def _say(self, line: str) -> None:
        if self.progress is not False and loaders.process()[0] == 0:
            tqdm.write(line, file=sys.stderr)

    def _say_epoch(self, stage: int, epochs: int) -> None:
        record = self.history[f"stage{stage}"][-1]
        parts = [f"stage {stage}  epoch {record['epoch']:3d}/{epochs}"]
        if "loss" in record:
            parts.append(f"loss {record['loss']:.4f}  train mIoU {record['miou'] or 0:.4f}  {record['seconds']:.1f} s")
        for part, scores in record.get("val", {}).items():
            parts.append(f"val {part} mIoU {scores['miou'] or 0:.4f}")
        self._say("  ".join(parts))


def _step(module: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return module(image, label)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"batch normalisation cannot train on a batch of {len(image)} image: it has one value per channel; "
            "if that is the rest of an epoch, give the DataLoader drop_last=True"
        ) from error


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
