"""A small training run for the tests of resuming and of several processes: python tests/tiny_run.py OUT [options]."""

import argparse
import os
import signal

import torch
from torch.utils.data import DataLoader

from pwlib.crf import DenseCRF
from pwlib.data import Augment, load
from pwlib.model import PiecewiseTrainedModel
from pwlib.networks import DeepLabLargeFOV
from pwlib.trainer import PiecewiseTrainer

SIZE, K = (16, 24), 10


class Counted:
    """A transform that counts the images it is applied to, and calls `then` at the `limit`-th."""

    def __init__(self, limit, then):
        self.left, self.then = limit, then

    def __call__(self, transform):
        def counted(image, label):
            self.left -= 1
            if self.left == 0:
                self.then()
            return transform(image, label)

        return counted


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def tiny_model(batch_norm=True, dropout=0.5):
    torch.manual_seed(0)
    unary = DeepLabLargeFOV(K, width=1 / 16, batch_norm=batch_norm, dropout=dropout)
    crf = DenseCRF(K, theta_alpha=6.0, theta_beta=20.0, theta_gamma=1.5, w_bilateral=3.0, w_spatial=1.0)
    return PiecewiseTrainedModel(K, unary=unary, crf=crf)


def run(out=None, *, stop_at=0, then=die, batch=3, batch_norm=True, dropout=0.5, augment=True, **options):
    """Two epochs per stage, with 8 images in stage 1, 4 in stage 2 (read twice, for the temperature), 12 in stage 3."""
    scenes = load("scenes", "train", size=SIZE, length=12)
    counted = Counted(stop_at, then)
    transform = counted(Augment() if augment else lambda image, label: (image, label))

    def loader(dataset):
        return DataLoader(dataset.with_transform(transform), batch_size=batch, shuffle=True)

    val = DataLoader(load("scenes", "val", size=SIZE, length=5), batch_size=2)
    options = {"learning_rate": 1e-2, "progress": False, **options}
    trainer = PiecewiseTrainer(tiny_model(batch_norm, dropout), "cpu", K, out=out, **options)
    trainer.train_stage1(loader(scenes.subset(range(8))), 2, val)
    trainer.train_stage2(loader(scenes.subset(range(8, 12))), 2, val)
    trainer.train_stage3(loader(scenes), 2, val)
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of the parameters and buffers that are not bit-identical to `before`."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def untimed(history):
    """A history without timings."""
    clock = ("seconds", "images_per_second")
    return {
        stage: [{k: v for k, v in record.items() if k not in clock} for record in records]
        for stage, records in history.items()
    }


PLAIN = {
    "batch_norm": False,
    "dropout": 0.0,
    "augment": False,
}  # without batch norm and random numbers, two processes compute what one does

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--distributed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.distributed:
        torch.distributed.init_process_group("gloo")
        run(args.out, batch=2, **PLAIN)
        torch.distributed.destroy_process_group()
    else:
        run(args.out, resume=args.resume, stop_at=args.kill_at)
