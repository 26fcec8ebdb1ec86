"""Paired augmentation: the label goes through the same geometric transform as its image."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .images import VOID, check_size, resize_image, resize_label


class Augment:
    """Random scale, flip, crop and colour: (image float32 [3, H, W], label int64 [H, W]) -> the same at `size`.

    Args:
        size: (H, W) of the crop; None: the input's size. Outside the image, pixels are grey (0.5) and labels void.
        scale: range of the zoom, log-uniform; the paper trains with 0.7 to 1.2.
        flip: probability of a left-right flip.
        colour: brightness, contrast and saturation are multiplied by 1 +- colour; hue turns by up to colour / 4 (of 1).
        seed: None: use torch's global generator, which a DataLoader seeds for each worker and epoch. An integer: use an
            own generator, in a worker seeded with the worker's seed too, so that workers draw different numbers.
    """

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.7, 1.2),
        flip: float = 0.5,
        colour: float = 0.2,
        seed: int | None = None,
    ):
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Augment: scale {scale} is not a range of positive factors, low to high")
        if not 0 <= flip <= 1 or not 0 <= colour < 1:
            raise ValueError(f"Augment: flip {flip} and colour {colour} are expected in [0, 1]")
        self.size = None if size is None else check_size(size, "Augment")
        self.scale, self.flip, self.colour, self.seed = scale, flip, colour, seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._worker = None

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if image.shape[-2:] != label.shape:
            raise ValueError(f"Augment: image {list(image.shape)} and label {list(label.shape)} differ in size")
        height, width = self.size or label.shape
        low, high = torch.tensor(self.scale).log().tolist()
        zoom = float(torch.tensor(self._uniform(low, high)).exp())
        scaled = [max(1, round(side * zoom)) for side in label.shape]
        # The corner of the crop: inside the image if the image is larger, outside if the crop is larger.
        top, left = round(self._uniform(0, scaled[0] - height)), round(self._uniform(0, scaled[1] - width))
        image, label = resize_image(image, scaled), resize_label(label, scaled)
        if self._uniform(0, 1) < self.flip:
            image, label = image.flip(-1), label.flip(-1)
        margins = [-left, left + width - scaled[1], -top, top + height - scaled[0]]  # negative: cut off
        image, label = pad(image, margins, value=0.5), pad(label, margins, value=VOID)
        brightness, contrast, saturation = (self._uniform(1 - self.colour, 1 + self.colour) for _ in range(3))
        hue = self._uniform(-self.colour, self.colour) / 4
        if self.colour:
            from torchvision.transforms.v2 import functional as F

            image = F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
            image = F.adjust_hue(F.adjust_saturation(image, saturation), hue)
        return image, label

    def _uniform(self, low: float, high: float) -> float:
        worker = torch.utils.data.get_worker_info()
        if self.generator is not None and worker is not None and self._worker != worker.seed:
            self.generator.manual_seed(self.seed + worker.seed)
            self._worker = worker.seed
        return low + (high - low) * float(torch.rand((), generator=self.generator))
