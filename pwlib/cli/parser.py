"""The arguments of `python -m pwlib train | evaluate | predict | bench`, and what its errors look like."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

DATA = ("scenes", "camvid", "voc2012", "folder")
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
EXIT_CODES = "exit codes: 0 done, 1 failed while running, 2 wrong usage or input, 130 interrupted"

TRAIN_EXAMPLES = """examples:
  python -m pwlib train --data scenes --out runs/scenes
  python -m pwlib train --data camvid --root data --download --profile quick --out runs/camvid
  python -m pwlib train --data scenes --context --out runs/paper
  python -m pwlib train --data folder --root my_images --size 96x128 --epochs 30,4,4 --out runs/mine
  python -m pwlib train --out runs/camvid --resume                    after a kill or Ctrl-C
  torchrun --nproc-per-node=2 -m pwlib train --data voc2012 --profile full --out runs/voc
"""
EVALUATE_EXAMPLES = """examples:
  python -m pwlib evaluate runs/scenes --split test
  python -m pwlib evaluate runs/camvid --data camvid --root data --split val --json scores.json
"""
PREDICT_EXAMPLES = """examples:
  python -m pwlib predict runs/camvid street.jpg --out predictions
  python -m pwlib predict runs/camvid *.png --out predictions --no-crf
"""


def size(text: str) -> tuple[int, int]:
    """Parse HxW, for example 90x120."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(int(side) for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; expected height x width in pixels, like 90x120")
    return int(match[1]), int(match[2])


def epochs(text: str) -> tuple[int, int, int]:
    """Parse a,b,c: the epochs of stages 1, 2 and 3."""
    if not re.fullmatch(r"\d+,\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers of epochs; expected, for example, 20,5,10")
    return tuple(int(part) for part in text.split(","))


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def parser(argv: list[str]) -> argparse.ArgumentParser:
    """Build the parser; the arguments of `bench` are defined only if argv asks for it."""
    top = argparse.ArgumentParser(
        prog="python -m pwlib", description="Train, score and use a CNN + CRF segmenter.", epilog=EXIT_CODES
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="train | evaluate | predict | bench")

    def command(name: str, text: str, examples: str = "") -> argparse.ArgumentParser:
        options = {"epilog": f"{examples}\n{EXIT_CODES}", "formatter_class": argparse.RawDescriptionHelpFormatter}
        sub = commands.add_parser(name, help=text, description=text, **options)
        if name != "bench":
            sub.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        return sub

    train = command("train", "Train in three stages and print the scores of each.", TRAIN_EXAMPLES)
    train.add_argument("--data", choices=DATA, help="data set (needed, unless resuming)")
    train.add_argument("--root", metavar="DIR", help="folder of the data set (default: data; scenes need none)")
    train.add_argument("--profile", choices=("quick", "full"), help="quick: for two CPUs (default); full: for a GPU")
    train.add_argument("--out", metavar="RUN", required=True, help="run folder, new or empty")
    train.add_argument("--resume", action="store_true", help="continue the run in RUN")
    train.add_argument("--seed", type=natural, metavar="N", help="of weights, order and augmentation (default: 0)")
    train.add_argument("--size", type=size, metavar="HxW", help="resize images to this (default: the profile's)")
    text = "the paper's model: FeatMap-Net and a contextual CRF before the dense one"
    train.add_argument("--context", action="store_const", const=True, help=text)
    train.add_argument("--epochs", type=epochs, metavar="A,B,C", help="of stages 1, 2, 3 (default: the profile's)")

    evaluate = command("evaluate", "Score every stage of a run; JSON on standard output.", EVALUATE_EXAMPLES)
    evaluate.add_argument("run", metavar="RUN", help="run folder")
    evaluate.add_argument("--data", choices=DATA, help="data set (default: the run's)")
    evaluate.add_argument("--root", metavar="DIR", help="folder of the data set (default: the run's)")
    evaluate.add_argument("--split", default="val", help="train, val or test (default: val)")
    evaluate.add_argument("--json", metavar="FILE", help="write the scores there instead")

    for sub in (train, evaluate):
        sub.add_argument("--download", action="store_true", help="fetch camvid or voc2012 if it is not in the root")
        sub.add_argument("--workers", type=natural, default=0, metavar="N", help="loader processes (default: 0)")
    train.add_argument("--quiet", action="store_true", help="only the table at the end")

    predict = command("predict", "Label images: label PNG, overlay and confidence for each.", PREDICT_EXAMPLES)
    predict.add_argument("run", metavar="RUN", help="run folder")
    predict.add_argument("images", metavar="IMAGE", nargs="+", help="any image Pillow opens, any size")
    predict.add_argument("--out", metavar="DIR", required=True, help="folder for the results")
    predict.add_argument("--no-crf", dest="crf", action="store_false", help="the network alone")

    bench = command("bench", "Time the CRF's message passing.")
    if argv[:1] == ["bench"]:
        benchmark().add_arguments(bench)
    return top


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
    for option, is_folder in (("json", False), ("out", True)):
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
    argv = sys.argv[1:] if argv is None else argv
    args = argparse.Namespace(command=None)
    try:
        args = parser(argv).parse_args(argv)
        check_outputs(args)
        if args.command == "bench":
            return benchmark().run(args) or 0
        from pwlib.cli import commands

        run = {"train": commands.train, "evaluate": commands.evaluate_run, "predict": commands.predict}
        run[args.command](args)
        return 0
    except KeyboardInterrupt:
        hint = f"; continue with: python -m pwlib train --out {args.out} --resume" if args.command == "train" else ""
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
