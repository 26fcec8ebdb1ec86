"""The arguments of `python -m pwlib`, its exit codes and its errors."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pwlib.annotations.classes import parse_values
from pwlib.cli.profiles import PROFILES, summary

OWN_PARSERS = {  # commands whose module defines their arguments
    "convert": "Convert LabelMe, COCO or mask annotations to a folder of images and labels.",
    "export": "Export the network of a run with torch.export or to ONNX.",
    "bench": "Time the CRF's message passing.",
}
COMMANDS = ("train", "evaluate", "predict", "labels", *OWN_PARSERS)
DATA = tuple(dict.fromkeys(data for data, _ in PROFILES))
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
EXIT_CODES = "exit codes: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted"

TRAIN_EXAMPLES = """examples:
  python -m pwlib train --data scenes --out runs/scenes
  python -m pwlib train --data camvid --root data --download --profile quick --out runs/camvid
  python -m pwlib train --data scenes --context --out runs/paper
  python -m pwlib train --data folder --root my_images --size 96x128 --epochs 30,4,4 --out runs/mine
  python -m pwlib train --out runs/camvid --resume                    after a kill or Ctrl-C
  python -m pwlib train --data folder --root my_images --weights vgg16.pt --out runs/pretrained
  torchrun --nproc-per-node=2 -m pwlib train --data voc2012 --profile full --out runs/voc

profiles (image size in px; crops where images keep their size; epochs of the three stages; learning rate):
"""
EVALUATE_EXAMPLES = """examples:
  python -m pwlib evaluate runs/scenes --split test
  python -m pwlib evaluate runs/camvid --data camvid --root data --split val --json scores.json
"""
LABELS_EXAMPLES = """examples:
  python -m pwlib labels my_images --sheet labels.png
  python -m pwlib labels my_images --classes background,leaf --values 0=0,255=1
"""
PREDICT_EXAMPLES = """examples:
  python -m pwlib predict runs/camvid street.jpg --out predictions
  python -m pwlib predict runs/camvid holiday/ 'trip/*.jpg' --out predictions --no-crf
  python -m pwlib predict runs/camvid 'holiday/**/*' --out predictions                   with subfolders
"""


def argument(expected: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument type; texts for which `parse` raises ValueError or returns None are not `expected`."""

    def convert(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = None
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return convert


def integers(pattern: str, text: str, least: int = 0) -> tuple[int, ...] | None:
    """The groups of a pattern as integers, if the whole text matches and none is below `least`."""
    match = re.fullmatch(pattern, text)
    numbers = tuple(map(int, match.groups())) if match else None
    return numbers if numbers and min(numbers) >= least else None


size = argument("a size; expected height x width in pixels, like 90x120", lambda t: integers(r"(\d+)x(\d+)", t, 1))
epochs = argument("three numbers of epochs, like 20,5,10", lambda t: integers(r"(\d+),(\d+),(\d+)", t))
natural = argument("a whole number of at least 0", lambda t: int(t) if t.isdecimal() else None)
positive = argument("a whole number of at least 1", lambda t: int(t) if t.isdecimal() and int(t) else None)
rate = argument("a positive number", lambda t: float(t) if 0 < float(t) < math.inf else None)
void = argument("a label value or none", lambda t: t if t == "none" or t.isdecimal() else None)
mapping = argument(
    "a mapping of label values to classes; expected, for example, 0=0,255=1,128=void",
    lambda t: sorted(parse_values(t).items()),  # pairs, which JSON can store
)
place = argument("a path", lambda t: str(Path(t).resolve()) if Path(t).is_file() else t)


def parser(argv: list[str]) -> argparse.ArgumentParser:
    """Build the parser; the arguments in `OWN_PARSERS` are defined only for the command in argv."""
    top = argparse.ArgumentParser(
        prog="python -m pwlib", description="Train, score and use a CNN + CRF segmenter.", epilog=EXIT_CODES
    )
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))

    def command(name: str, text: str, examples: str = "") -> argparse.ArgumentParser:
        options = {"epilog": f"{examples}\n{EXIT_CODES}", "formatter_class": argparse.RawDescriptionHelpFormatter}
        sub = commands.add_parser(name, help=text, description=text, **options)
        if name in ("train", "evaluate", "predict"):
            sub.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        return sub

    train = command("train", "Train in three stages and print the scores of each.", TRAIN_EXAMPLES + summary())
    train.add_argument("--data", choices=DATA, help="data set (needed, unless resuming)")
    train.add_argument("--root", metavar="DIR", help="folder of the data set (default: data; scenes need none)")
    train.add_argument("--profile", choices=("quick", "full"), help="quick: for two CPUs (default); full: for a GPU")
    train.add_argument("--out", metavar="RUN", required=True, help="run folder, new or empty")
    train.add_argument("--resume", action="store_true", help="continue the run in RUN")
    train.add_argument("--seed", type=natural, metavar="N", help="of weights, order and augmentation (default: 0)")
    text = "resize images to this (default: the profile's; folder: in their shape)"
    train.add_argument("--size", type=size, metavar="HxW", help=text)
    train.add_argument("--context", action="store_const", const=True, help="the paper's FeatMap-Net and contextual CRF")
    train.add_argument("--epochs", type=epochs, metavar="A,B,C", help="of stages 1, 2, 3 (default: the profile's)")
    train.add_argument("--batch", type=positive, metavar="N", help="images per step (default: the profile's)")
    train.add_argument("--learning-rate", type=rate, metavar="R", help="of the network (default: the profile's)")
    text = "start from VGG-16 at full width: imagenet (528 MB), or a file with its state dict or its convolutions"
    train.add_argument("--weights", type=place, metavar="FILE|imagenet", help=text)

    evaluate = command("evaluate", "Score every stage of a run; JSON on standard output.", EVALUATE_EXAMPLES)
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    evaluate.add_argument("--data", choices=DATA, help="data set (default: the run's)")
    evaluate.add_argument("--root", metavar="DIR", help="folder of the data set (default: the run's)")
    evaluate.add_argument("--split", default="val", help="train, val or test (default: val)")
    evaluate.add_argument("--json", metavar="FILE", help="write the scores there instead")

    labels = command("labels", "Check and summarise a folder of images and labels.", LABELS_EXAMPLES)
    labels.add_argument("root", metavar="ROOT", help="folder with train/images, train/labels, ..., or images, labels")
    labels.add_argument("--sheet", metavar="FILE", help="write a picture of images with their labels there")
    for sub in (train, labels):
        group = sub.add_argument_group("the meaning of label files (--data folder)")
        group.add_argument("--classes", type=place, metavar="A,B|FILE", help="names (default: ROOT/classes.txt)")
        group.add_argument("--palette", type=place, metavar="FILE", help="lines `name r g b`: colours of colour masks")
        group.add_argument("--values", type=mapping, metavar="V=K,...", help="values to classes: 0=0,255=1,9=void")
        group.add_argument("--void", type=void, metavar="V|none", help="label value that is void (default: 255)")

    for sub in (train, evaluate):
        sub.add_argument("--download", action="store_true", help="fetch camvid or voc2012 if it is not in the root")
        sub.add_argument("--workers", type=natural, default=0, metavar="N", help="loader processes (default: 0)")
    train.add_argument("--quiet", action="store_true", help="only the table at the end")

    predict = command("predict", "Label images: label PNG, overlay and confidence for each.", PREDICT_EXAMPLES)
    predict.add_argument("run", metavar="RUN", help="run folder")
    text = "images of any size, folders without their subfolders, or patterns"
    predict.add_argument("images", metavar="IMAGE", nargs="+", help=text)
    text = "folder for the results; replaces earlier ones, but no file that predict did not write or that was changed"
    predict.add_argument("--out", metavar="DIR", required=True, help=text)
    predict.add_argument("--no-crf", dest="crf", action="store_false", help="the network alone")

    for name, text in OWN_PARSERS.items():
        sub = command(name, text)
        if argv[:1] == [name]:
            own_parser(name).add_arguments(sub)
    return top


def own_parser(name: str) -> ModuleType:
    """The module that defines the arguments of a command (`add_arguments`) and runs it (`run`)."""
    if name == "bench":
        return benchmark()
    return importlib.import_module({"convert": "pwlib.annotations.convert", "export": "pwlib.tools.export"}[name])


def benchmark() -> ModuleType:
    """Import `benchmarks/crf/bench.py`, which is part of a checkout of the project but not of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "crf" / "bench.py"
    if not path.is_file():
        raise FileNotFoundError(f"bench needs a checkout of the project and is not in the package: {path} is missing")
    spec = importlib.util.spec_from_file_location("pwlib_bench", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_outputs(args: argparse.Namespace) -> None:
    """Raise an error if --json or --out cannot be written, before a command starts to work."""
    for option, is_folder in (("json", False), ("sheet", False), ("file", False), ("out", True)):
        if (name := getattr(args, option, None)) is None:
            continue
        path = Path(name).absolute()
        existing = next(place for place in (path, *path.parents) if place.exists())
        if is_folder and not existing.is_dir():
            raise NotADirectoryError(f"--{option} {name}: {existing} is not a folder")
        if not is_folder and (path.is_dir() or not path.parent.is_dir()):
            raise FileNotFoundError(f"--{option} {name}: expected the name of a file in an existing folder")
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"--{option} {name}: {existing} is not writable")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code; errors are printed in one sentence on standard error."""
    if getattr(sys.stdout, "errors", None) == "strict":  # a file name that the output cannot encode must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(command=None)
    try:
        args = parser(argv).parse_args(argv)
        check_outputs(args)
        if args.command in OWN_PARSERS:
            return own_parser(args.command).run(args) or 0
        from pwlib.cli import commands

        return getattr(commands, args.command)(args) or 0
    except KeyboardInterrupt:
        begun = args.command == "train" and (Path(args.out) / "config.json").is_file()
        hint = f"; continue with: python -m pwlib train --out {args.out} --resume" if begun else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    except (ValueError, *WRONG_PATH) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except (OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        print(f"failed: {sentence(error)}", file=sys.stderr)
        return 1


def sentence(error: BaseException) -> str:
    """Reduce an error to one line: the first, or the last if it contains the traceback of a loader process."""
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error).strip()
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {text}"
    lines = text.splitlines() or [type(error).__name__]
    return lines[-1] if "Traceback" in text else lines[0]
