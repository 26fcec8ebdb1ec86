"""Draw the README's photograph before and after the dense CRF: `python docs/photograph.py`."""

from pathlib import Path

import pwlib
from pwlib.course import photos, plots

image, strokes = photos.load("portrait"), photos.strokes("portrait")  # [3, H, W], int64 [H, W]
regions, palette = list(photos.REGIONS["portrait"]), photos.PALETTE
given = pwlib.probabilities_from_labels(strokes, len(regions), confidence=0.9)  # [K, H, W]
pixels = (255 * image).round().byte().permute(1, 2, 0)  # uint8 [H, W, 3]
labels = pwlib.dense_crf(pixels, given, theta_alpha=40, theta_beta=20).argmax(0)
figure = plots.strokes(image, strokes, {"dense CRF": labels}, palette, regions)
figure.savefig(Path(__file__).with_name("photograph.png"), dpi=80)
