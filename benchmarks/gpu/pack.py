"""Pack CamVid small for a machine that is reached by slow means, and measure what travels there.

    python benchmarks/gpu/pack.py FOLDER TARGET        FOLDER/camvid -> TARGET/camvid: train and val, at most 15 MB
    python benchmarks/gpu/pack.py --sizes LIMIT SET... each set together with the working tree, in bytes, below LIMIT

Images become JPEGs of quality 68; labels are copied unchanged.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

QUALITY = 68  # 14.4 MB with the labels
ROOT = Path(__file__).parents[2]


def pack(source: Path, target: Path) -> int:
    """Copy train and val of `source`/camvid to `target`/camvid with smaller images; returns the bytes written."""
    for split in ("train", "val"):
        images, labels = (target / "camvid" / part for part in (split, f"{split}annot"))
        images.mkdir(parents=True, exist_ok=True)
        for path in sorted((source / "camvid" / split).iterdir()):
            if path.suffix.lower() in (".png", ".jpg"):
                with Image.open(path) as image:
                    image.convert("RGB").save(images / f"{path.stem}.jpg", quality=QUALITY, optimize=True)
        shutil.copytree(source / "camvid" / f"{split}annot", labels, dirs_exist_ok=True)
    return size(target / "camvid")


def size(folder: Path) -> int:
    """Bytes of all files below a folder, or of one file."""
    files = folder.rglob("*") if folder.is_dir() else [folder]
    return sum(path.stat().st_size for path in files if path.is_file())


def working_tree(root: Path = ROOT) -> int:
    """Bytes of the files that git tracks or would track: what travels besides a set."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return sum(size(root / name) for name in set(names) if name and (root / name).is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, metavar="LIMIT", help="measure the folders; fail above LIMIT bytes")
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    if args.sizes is None:
        source, target = args.folders
        print(f"{target}/camvid: {pack(source, target) / 1e6:.1f} MB")
        return 0
    tree, failed = working_tree(), False
    print(f"working tree {tree / 2**20:.1f} MiB")
    for folder in args.folders:
        total = tree + size(folder)
        failed |= total > args.sizes
        print(f"{folder} {size(folder) / 2**20:.1f} MiB, together {total / 2**20:.1f} of {args.sizes / 2**20:.0f} MiB")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
