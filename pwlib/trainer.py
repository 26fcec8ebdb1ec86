"""Training in three stages.

    stage 1   the unary network alone                          on the training images
    stage 2   the CRFs alone, on the frozen network's logits   on images that stage 1 was not fitted to
    stage 3   everything together, with a smaller rate         on the training images

"Piecewise" has two meanings here. Training in stages is how DeepLab and CRF-as-RNN (Zheng et al., ICCV 2015) proceed.
Piecewise training of the CRF (Sutton & McCallum 2005; Lin et al., CVPR 2016) maximises the likelihood of locally
normalised potentials, without inference; stage 2 does this with `crf_loss=pwlib.course.piecewise.structured`. The
default, "marginal", is the likelihood of the labels under the mean-field marginals.

Stage 2 has images of its own, because the network makes few errors on the images it was fitted to, and the CRF would
learn that it is not needed. The likelihood of stage 2 has no class weights, whose prior the CRF would follow further
than a network does; the pair loss of a context has them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from pwlib import checkpoints, loaders
from pwlib.data import VOID, SegmentationDataset, hold_out
from pwlib.evaluation import best_record, evaluate
from pwlib.inputs import at_least
from pwlib.loaders import Batches, explained_errors, rank_and_world_size
from pwlib.metrics import ConfusionMatrix
from pwlib.model import PiecewiseTrainedModel, kept_modes
from pwlib.objective import Objective, TrainerOptions, fit_temperature, schedule_factor

History = dict[str, list[dict[str, Any]]]
CRF_PARAMETERS = ("crf.", "context.weight", "context.log_")  # not the pairwise networks of a context


class PiecewiseTrainer:
    """Trains a `PiecewiseTrainedModel` stage by stage.

    Args:
        model: moved to `device`, where it is trained; has `num_classes` classes.
        learning_rate: of the network in stage 1.
        out: folder for checkpoints and history.json (None: everything stays in memory).
        resume: continue the run in `out`.
        amp: mixed precision in the network (None: on a GPU); the CRF always computes in float32. A CPU without
            instructions for bfloat16 trains many times more slowly with it.
        progress: None for a line per epoch, and progress bars on a terminal; True for bars anywhere; False for neither.
        options: the other fields of `TrainerOptions`.

    `history` maps "stage1", "stage2" and "stage3" to a list with a dict per epoch, ready for JSON: epoch, loss, miou
    (of the training batches), learning_rate, seconds, images_per_second and, with a val_loader, "val": {"unary":
    scores, "crf": scores}. Stages 2 and 3 then begin with an epoch 0, the scores before the first step.

    A stage ends with the weights of its best epoch: the one with the highest validation mIoU (of the CRF, in stages 2
    and 3; epoch 0 included), or the last one without a val_loader. A stage that is trained a second time starts anew
    from the model as it is, and its history is replaced, unless it resumes. The randomness of an epoch depends only on
    (seed, stage, epoch), if transforms draw from torch's global generator, as torchvision's and `Augment` do. Under
    torchrun, with an initialised process group, batch sizes are per process.
    """

    def __init__(
        self,
        model: PiecewiseTrainedModel,
        device: torch.device | str = "cpu",
        num_classes: int = 21,
        learning_rate: float = 1e-3,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        amp: bool | None = None,
        progress: bool | None = None,
        **options,
    ):
        self.options = TrainerOptions(num_classes, learning_rate, **options)
        if num_classes != model.num_classes:
            raise ValueError(f"num_classes is {num_classes}; the model has {model.num_classes}")
        self.config = self.options.as_dict()  # stored in every checkpoint, and compared when a run is resumed
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.amp = None
        if self.device.type == "cuda" if amp is None else amp:
            bfloat16 = self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            self.amp = torch.bfloat16 if bfloat16 else torch.float16
        self.progress, self.resume = progress, resume
        self.out = None if out is None else Path(out)
        self.history: History = {}
        if self.out is not None:
            if not resume and any(self.out.glob("stage*.pt")):
                raise FileExistsError(f"{self.out} holds a run already; resume it, or choose another folder")
            self.out.mkdir(parents=True, exist_ok=True)

    def train_piecewise(
        self,
        train_loader: Batches,
        stage1_epochs: int = 20,
        stage2_epochs: int = 5,
        stage3_epochs: int = 10,
        val_loader: Batches | None = None,
        crf_loader: Batches | None = None,
    ) -> History:
        """Train all stages that have epochs, and return `history`.

        Without a `crf_loader`, a share of a `SegmentationDataset` is held out for stage 2 (whole drives or sequences,
        if the data set names them) and used without the training transform; stage 1 is fitted to the rest, stage 3 to
        all. With any other data set stage 2 uses the training images, and a line says so.
        """
        fit_loader = train_loader
        if stage2_epochs and crf_loader is None:
            dataset = getattr(train_loader, "dataset", None)
            if isinstance(dataset, SegmentationDataset):
                fit, held = hold_out(dataset, self.options.held_out)
                fit_loader = loaders.rebuilt(train_loader, dataset=fit)
                crf_loader = loaders.rebuilt(train_loader, dataset=held.with_transform(None))
            else:
                self._log("stage 2 learns on the images stage 1 was fitted to; a crf_loader= of others is better")
                crf_loader = train_loader
        self.train_stage1(fit_loader, stage1_epochs, val_loader)
        self.train_stage2(crf_loader, stage2_epochs, val_loader)
        return self.train_stage3(train_loader, stage3_epochs, val_loader)

    def train_stage1(self, train_loader: Batches, epochs: int = 20, val_loader: Batches | None = None) -> History:
        """Train the unary network alone."""
        return self._train(1, train_loader, epochs, val_loader)

    def train_stage2(self, crf_loader: Batches, epochs: int = 5, val_loader: Batches | None = None) -> History:
        """Train the CRFs alone; the network does not change, batch-norm statistics included.

        If stage 1 trained the pairwise networks of a context (`joint_pairwise`), the weight of its relations first
        becomes one of `context_weights`, if the labels of the first batches are then more likely than with the weights
        as they are (with the default `crf_loss`).
        """
        return self._train(2, crf_loader, epochs, val_loader)

    def train_stage3(self, train_loader: Batches, epochs: int = 10, val_loader: Batches | None = None) -> History:
        """Train the network and the CRFs together, with a smaller learning rate.

        With `average_stage3`, every epoch is scored, and kept, as the mean of its parameters and those that stage 3
        started from. This is meant to preserve the scores on other domains (Wortsman et al., "Robust fine-tuning of
        zero-shot models", CVPR 2022); `benchmarks/drives` found a difference on one of three left-out drives.
        """
        return self._train(3, train_loader, epochs, val_loader)

    def evaluate(self, loader: Batches, *, apply_crf: bool = True) -> dict[str, Any]:
        """Score the model as it is: `pwlib.evaluation.evaluate` with `test_iterations`."""
        options = {"iterations": self.options.test_iterations, "bar": self._bar}
        return evaluate(self.model, loader, apply_crf=apply_crf, **options)

    def _train(self, stage: int, loader: Batches, epochs: int, val_loader: Batches | None) -> History:
        """Check the arguments, and train; parameters that do not belong to the stage get no gradient.

        The pairwise networks of a context belong to stage 1 with `joint_pairwise`, and to stage 2 without.
        """
        at_least(0, **{f"stage{stage}_epochs": epochs})
        if epochs == 0:
            return self.history
        if not hasattr(loader, "__len__"):
            kind = type(loader).__name__
            raise ValueError(f"stage {stage} was given a {kind}, which has no length; expected a DataLoader or a list")
        if self.options.patience and val_loader is None:
            raise ValueError(f"patience is {self.options.patience}, but stage {stage} has no val_loader to score on")
        loader = loaders.rebuilt(loader)
        if len(loader) == 0:
            raise ValueError(f"stage {stage} has no batch to train on: the loader is empty")
        objective = Objective(self.model, stage, self.options, self.amp)
        prefixes = {1: ["unary."], 2: [*CRF_PARAMETERS], 3: [""]}
        prefixes[1 if self.options.joint_pairwise else 2].append("context.")
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in parameters.items() if name.startswith(tuple(prefixes[stage]))}
        untrained = [p for name, p in parameters.items() if name not in trained]
        for parameter in untrained:
            parameter.requires_grad_(False)
        try:
            with kept_modes(self.model), explained_errors():
                self._fit(stage, objective, self._optimizer(trained, stage), loader, epochs, val_loader)
        finally:
            for parameter in untrained:
                parameter.requires_grad_(True)
        return self.history

    def _optimizer(self, trained: dict[str, nn.Parameter], stage: int) -> torch.optim.Optimizer:
        """Parameter groups with their peak rates: the network's weights (decayed), its other parameters, the CRF's."""
        options, factor = self.options, self.options.stage3_factor if stage == 3 else 1.0
        groups: dict[str, dict[str, Any]] = {}
        for name, parameter in trained.items():
            kind = "weights" if parameter.ndim > 1 else "others"
            kind = "crf" if name.startswith(CRF_PARAMETERS) else kind
            peak = factor * (options.crf_learning_rate if kind == "crf" else options.learning_rate)
            decay = options.weight_decay if kind == "weights" else 0.0
            group = {"params": [], "peak": peak, "lr": peak, "weight_decay": decay}
            groups.setdefault(kind, group)["params"].append(parameter)
        if not groups:
            raise ValueError(f"stage {stage} has nothing to train: no parameter requires a gradient")
        optimizer = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}[options.optimizer]
        return optimizer(groups.values())

    def _fit(self, stage: int, objective: Objective, optimizer, loader, epochs: int, val_loader) -> None:
        """The epochs of a stage: train, evaluate, keep the best, store checkpoints."""
        options, name, (rank, world_size) = self.options, f"stage{stage}", rank_and_world_size()
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        plan = {"config": self.config, "epochs": epochs, "batches": len(loader)}
        keeps = options.stage1_keeps if stage == 1 else "best"
        first, best, start = 1, {}, {}
        if stage == 3 and options.average_stage3:
            start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if last := self._last_checkpoint(name, plan):
            optimizer.load_state_dict(last["optimizer"])
            scaler.load_state_dict(last["scaler"])
            self.history, first, start = last["history"], last["epoch"] + 1, last.get("start", {})
            best = checkpoints.load(self.out / f"{name}-best.pt")["model"]
        else:
            self.history[name] = []
        records = self.history[name]

        def finish_epoch(record: dict[str, Any]) -> None:
            nonlocal best
            records.append(record)
            self._log(f"stage {stage}  epoch {record['epoch']:3d}/{epochs}", record)
            if best_record(records, keeps) is record:
                with averaged(self.model, start):
                    best = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
                self._save(f"{name}-best.pt", {**plan, "epoch": record["epoch"], "model": best})
            if record["epoch"] > 0:
                state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"scaler": scaler.state_dict(), "history": self.history, "epoch": record["epoch"]}
                state |= {"start": start} if start else {}
                self._save(f"{name}-last.pt", {**plan, **state})

        marginal = stage == 2 and options.crf_loss == "marginal"
        if not records and stage > 1 and val_loader is not None:
            finish_epoch({"epoch": 0, "val": self.evaluate(val_loader)})
        module = DistributedDataParallel(objective) if world_size > 1 else objective
        for epoch in range(first, epochs + 1):
            waited = records[-1]["epoch"] - best_record(records)["epoch"] if records else 0
            if options.patience and waited >= options.patience:
                break
            if marginal and epoch == 1 and objective.has_pairs and options.joint_pairwise:
                self._choose_weight(objective, loader)
            if marginal:
                objective.temperature = fit_temperature(*self._marginals(objective, loader))
            seed = loaders.derive_seed(options.seed, stage, epoch)
            loaders.start_epoch(loader, seed)
            with loaders.seeded(seed + rank, self.device):
                record = self._epoch(module, optimizer, scaler, loader, stage, epoch, epochs)
            if val_loader is not None:
                with averaged(self.model, start):
                    record["val"] = self.evaluate(val_loader, apply_crf=stage > 1)
            finish_epoch(record)
        self.model.load_state_dict(best)

    @torch.no_grad()
    def _marginals(self, objective: Objective, loader: Batches, batches: int = 4) -> tuple[Tensor, Tensor]:
        """Log-marginals [N, K] and labels [N] of the first batches of stage 2; the same batches in every epoch."""
        seed = loaders.derive_seed(self.options.seed, 2, 0)
        loaders.start_epoch(loader, seed)
        log_q, labels = [], []
        with loaders.seeded(seed + rank_and_world_size()[0], self.device):
            for batch in itertools.islice(loader, batches):
                image, label = loaders.read_batch(batch, self.device)
                scores = objective.train()(image, label)[1].movedim(1, -1)  # [B, H, W, K]
                log_q.append(scores[label != VOID])  # [N, K]
                labels.append(label[label != VOID])  # [N]
        return torch.cat(log_q), torch.cat(labels)

    @torch.no_grad()
    def _choose_weight(self, objective: Objective, loader: Batches) -> None:
        """Give a context's relations the weight under which the labels of some batches are most likely.

        Each weight is judged at its best temperature. Adam moves a weight by about the learning rate in a step: from 1,
        short training would not reach 0.
        """
        weight = self.model.context.weight
        if not weight.requires_grad:
            return
        chosen, least = weight.clone(), math.inf
        candidates = [chosen, *(torch.full_like(weight, value) for value in self.options.context_weights)]
        try:
            for candidate in candidates:
                weight.copy_(candidate)
                log_q, label = self._marginals(objective, loader)
                log_p = torch.log_softmax(log_q / fit_temperature(log_q, label), -1)  # [N, K]
                loss = loaders.all_reduce_sum(-log_p.gather(1, label[:, None]).double().sum()).item()
                if loss < least:
                    chosen, least = candidate, loss
        finally:
            weight.copy_(chosen)
        self._log(f"stage 2 starts with the weights {', '.join(f'{w:g}' for w in weight.tolist())} of the context")

    def _epoch(self, module, optimizer, scaler, loader, stage: int, epoch: int, epochs: int) -> dict[str, Any]:
        """One epoch of training; returns its record."""
        module.train()
        options, world_size = self.options, rank_and_world_size()[1]
        weights = options.class_weights if stage == 1 else None  # [K]; in stages 2 and 3 every pixel counts as 1
        confusion = ConfusionMatrix(options.num_classes, device=self.device)
        total = torch.zeros(2, device=self.device, dtype=torch.float64)  # sums of loss * weight, and of weight
        start, images, peak = time.perf_counter(), 0, 0.0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with self._bar(loader, f"stage {stage} {epoch}/{epochs}") as bar:
            for step, batch in enumerate(bar):
                image, label = loaders.read_batch(batch, self.device)  # [B, 3, H, W] in [0, 1]; int64 [B, H, W]
                factor = schedule_factor(options.schedule, (epoch - 1 + step / len(loader)) / epochs)
                for group in optimizer.param_groups:
                    group["lr"] = factor * group["peak"]
                peak = max(peak, optimizer.param_groups[0]["lr"])
                loss, scores = module(image, label)  # [], [B, K, H, W]
                known = label != VOID  # [B, H, W]
                weight = known.sum().float() if weights is None else weights.to(self.device)[label[known]].sum()
                all_weights = loaders.all_reduce_sum(weight.clone()).clamp(min=1e-12)
                optimizer.zero_grad(set_to_none=True)
                # DistributedDataParallel averages gradients over processes; one process would average over pixels.
                scaler.scale(loss * (weight * world_size / all_weights)).backward()
                if not math.isfinite(loss.item()):
                    where = f"in stage {stage}, epoch {epoch}, step {step + 1}; expected a finite number"
                    raise FloatingPointError(f"the loss is {loss.item()} {where}: try a smaller learning rate")
                scaler.unscale_(optimizer)
                if options.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, options.clip)
                scaler.step(optimizer)
                scaler.update()
                confusion.update(scores.detach().argmax(1), label)  # [B, H, W] both
                total += torch.stack([loss.detach().double() * weight, weight.double()])
                images += len(image)
                bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}")
        loaders.all_reduce_sum(total)
        if world_size > 1:
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
            "images_per_second": round(images * world_size / seconds, 2),
        }

    def _save(self, name: str, state: dict[str, Any]) -> None:
        if self.out is not None and rank_and_world_size()[0] == 0:
            checkpoints.save(self.out / name, state)
            checkpoints.save_json(self.out / "history.json", self.history)

    def _last_checkpoint(self, name: str, plan: dict[str, Any]) -> dict[str, Any] | None:
        """Load the stage's last checkpoint into the model, if there is one to resume; ValueError for another plan."""
        path = None if self.out is None else self.out / f"{name}-last.pt"
        if path is None or not self.resume or not path.exists():
            return None
        state = checkpoints.load_model(path, self.model)
        usual = TrainerOptions().as_dict()  # for options that are newer than the checkpoint
        for key in [*self.config, "epochs", "batches"]:
            there, here = ({**usual, **side, **side["config"]}.get(key) for side in (state, plan))
            if there != here:
                raise ValueError(f"{path} was made with {key} = {there}, this run has {here}: it cannot be resumed")
        return state

    def _bar(self, batches: Batches, text: str = "scoring") -> tqdm:
        hidden = None if self.progress is None else not self.progress  # None: unless on a terminal
        return tqdm(batches, desc=text, unit="batch", leave=False, disable=bool(rank_and_world_size()[0]) or hidden)

    def _log(self, text: str, record: dict[str, Any] = MappingProxyType({})) -> None:
        if "loss" in record:
            text += f"  loss {record['loss']:.4f}  train mIoU {record['miou'] or 0:.4f}  {record['seconds']:.1f} s"
        for part, scores in record.get("val", {}).items():
            text += f"  val {part} mIoU {scores['miou'] or 0:.4f}"
        if self.progress is not False and rank_and_world_size()[0] == 0:
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def averaged(model: nn.Module, start: dict[str, Tensor]) -> Iterator[None]:
    """Within the block, parameters are the means of their values and those in `start`, if it has any."""
    now = {name: p.detach().clone() for name, p in model.named_parameters() if name in start}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.lerp_(start[name].to(parameter), 0.5)
        try:
            yield
        finally:
            for name, parameter in model.named_parameters():
                if name in start:
                    parameter.copy_(now[name])
