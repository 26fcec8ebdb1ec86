"""Paired augmentation: whatever happens to the image's geometry happens to its label."""

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from .images import VOID, check_size, resize_image, resize_label


class Augment(v2.Transform):
    """Random scale, flip, crop and colour, image and label together.

    `augment(image float32 [3, H, W], label int64 [H, W])` -> the same at `size` (by default the size that came in).

    size     (H, W) of the crop. Where it leaves the image, the image is grey (0.5) and the label void.
    scale    range of the zoom, log-uniform; the paper trains with 0.7-1.2
    flip     probability of a left-right flip
    colour   brightness, contrast and saturation each times 1 +- colour; hue turned by at most colour / 4 of the circle
    seed     None: numbers come from torch's global generator, which a DataLoader seeds anew in each worker and epoch,
             so a seeded loader gives the same run with the same workers. An integer: an own generator, mixed with the
             worker's seed when there is one, so that no two workers draw alike.
    """

    def __init__(
        self,
        size: tuple[int, int] | None = None,
        scale: tuple[float, float] = (0.7, 1.2),
        flip: float = 0.5,
        colour: float = 0.2,
        seed: int | None = None,
    ):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Augment: scale {scale} is not a range of positive factors, low to high")
        if not 0 <= flip <= 1 or not 0 <= colour < 1:
            raise ValueError(f"Augment: flip {flip} and colour {colour} are expected in [0, 1]")
        self.size = None if size is None else check_size(size, "Augment")
        self.scale, self.flip, self.colour, self.seed = scale, flip, colour, seed
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._worker = None

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if image.shape[-2:] != label.shape:
            raise ValueError(f"Augment: image {list(image.shape)} and label {list(label.shape)} differ in size")
        image, label = super().forward(tv_tensors.Image(image), tv_tensors.Mask(label))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    def _uniform(self, low: float, high: float) -> float:
        worker = torch.utils.data.get_worker_info()
        if self.generator is not None and worker is not None and self._worker != worker.seed:
            self.generator.manual_seed(self.seed + worker.seed)
            self._worker = worker.seed
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def make_params(self, flat_inputs: list) -> dict:
        """One draw, shared by image and label."""
        height, width = flat_inputs[0].shape[-2:]
        out_height, out_width = self.size or (height, width)
        low, high = torch.tensor(self.scale).log().tolist()
        zoom = float(torch.tensor(self._uniform(low, high)).exp())
        scaled = [max(1, round(height * zoom)), max(1, round(width * zoom))]
        # The crop's corner: inside the image where the image is larger, outside it where the crop is.
        top = round(self._uniform(0, scaled[0] - out_height))
        left = round(self._uniform(0, scaled[1] - out_width))
        return {
            "scaled": scaled,
            "flip": self._uniform(0, 1) < self.flip,
            "box": (top, left, out_height, out_width),
            "factors": [self._uniform(1 - self.colour, 1 + self.colour) for _ in range(3)],
            "hue": self._uniform(-self.colour, self.colour) / 4,
        }

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        is_image = isinstance(inpt, tv_tensors.Image)
        resize = resize_image if is_image else resize_label
        inpt = tv_tensors.wrap(resize(inpt.as_subclass(torch.Tensor), params["scaled"]), like=inpt)
        if params["flip"]:
            inpt = F.horizontal_flip(inpt)
        inpt = self._window(inpt, *params["box"], fill=0.5 if is_image else VOID)
        return self._colour(inpt, params) if is_image else inpt

    @staticmethod
    def _window(inpt: torch.Tensor, top: int, left: int, height: int, width: int, fill: float) -> torch.Tensor:
        """Crop, filled where the box leaves the input."""
        below, right = top + height - inpt.shape[-2], left + width - inpt.shape[-1]
        margins = [max(0, -left), max(0, -top), max(0, right), max(0, below)]
        return F.crop(F.pad(inpt, margins, fill=fill), max(0, top), max(0, left), height, width)

    def _colour(self, image: torch.Tensor, params: dict) -> torch.Tensor:
        if self.colour == 0:
            return image
        brightness, contrast, saturation = params["factors"]
        image = F.adjust_brightness(image, brightness)
        image = F.adjust_contrast(image, contrast)
        image = F.adjust_saturation(image, saturation)
        return F.adjust_hue(image, params["hue"])
