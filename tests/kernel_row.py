"""An oracle for the explorer: a row of the kernel matrix, from the features that a trace keeps."""

import torch
from torch import Tensor

from pwlib.trace import Trace


def kernel_row(trace: Trace, kernel: int, pixel: int) -> Tensor:
    """[H, W]: the weights with which `pixel` (row-major) receives the marginals of all pixels.

    The sum of the weights times q[t] over the pixels is messages[t, kernel] at `pixel`, up to the lattice's
    approximation.
    """
    features, sums = trace.features[kernel], trace.sums[kernel]  # [N, D], [N]
    weight = torch.exp(-(features - features[pixel]).square().sum(-1) / 2)  # [N]
    if not trace.self_message:
        weight[pixel] = 0
    if trace.normalization == "symmetric":
        weight = weight * (sums * sums[pixel]).rsqrt()
    elif trace.normalization == "row":
        weight = weight / sums[pixel]
    return weight.reshape(trace.q.shape[-2:])
