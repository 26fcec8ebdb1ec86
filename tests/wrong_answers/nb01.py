"""Planted wrong answers to the exercises of notebook 01, each with a part of the message that it must get."""


def span(kernel, dilation):
    return dilation * (kernel - 1) + 1


def field(layers, slip):
    r, j = (0 if slip == "start" else 1), 1
    for kernel, stride, dilation in layers:
        if slip == "stride first":
            j *= stride
        r += (kernel - (slip != "taps")) * (1 if slip == "dilation" else dilation) * j
        if slip not in ("stride first", "stride"):
            j *= stride
    return r


def squares(size, share, total=None):
    middle = len(size) // 2
    total = size.sum() if total is None else total
    for half in range(middle + 1):
        if size[middle - half : middle + half + 1, middle - half : middle + half + 1].sum() >= share * total:
            return half
    return middle


def more_than_the_share(gradient, share):
    size = gradient.abs()
    middle = len(size) // 2
    for half in range(middle + 1):
        if size[middle - half : middle + half + 1, middle - half : middle + half + 1].sum() > share * size.sum():
            return 2 * half + 1


def holes(layers, output_stride, slip):
    changed, stride_so_far, dilation = [], 1, 1
    for kernel, stride in layers:
        if stride_so_far * stride <= output_stride:
            stride_so_far *= stride
            changed.append((kernel, stride, dilation))
        elif slip == "own":
            dilation *= stride
            changed.append((kernel, 1, dilation))
        else:
            changed.append((kernel, 1, dilation))
            dilation = {"sum": dilation + stride, "last": stride, "none": 1}[slip]
    return changed


def wrong_share(prediction, label, distance, width, *, top, bottom):
    known, miss, near = label != 255, prediction != label, distance <= width
    masks = {"all": miss & near, "known": miss & near & known, "strict": miss & known & (distance < width)}
    totals = {"all": miss, "known": miss & known, "near": near & known, "pixels": known}
    return masks[top].sum() / totals[bottom].sum()


WRONG = {
    "01.1": [
        (lambda n, k, s, d, p: (n + 2 * p - k) // s + 1, "dilation is missing"),
        (lambda n, k, s, d, p: (n + 2 * p - span(k, d)) // s, "One too few"),
        (lambda n, k, s, d, p: (n + p - span(k, d)) // s + 1, "both ends"),
        (lambda n, k, s, d, p: (n + 2 * p - span(k, d)) / s + 1, "whole division"),
        (lambda n, k, s, d, p: -(-(n + 2 * p - span(k, d)) // s) + 1, "round down"),
        (lambda n, k, s, d, p: (n + 2 * p - k * d) // s + 1, "k - 1 gaps"),
    ],
    "01.2": [
        (lambda layers: field(layers, "dilation"), "dilation is missing"),
        (lambda layers: field(layers, "stride first"), "before you use it"),
        (lambda layers: field(layers, "stride"), "jump never changes"),
        (lambda layers: field(layers, "taps"), "k - 1 gaps"),
        (lambda layers: field(layers, "start"), "starts at 1"),
    ],
    "01.3": [
        (lambda gradient, share: 2 * squares(gradient, share) + 1, "Negative gradients"),
        (lambda gradient, share: squares(gradient.abs(), share), "half the side"),
        (lambda gradient, share: 2 * squares(gradient**2, share) + 1, "squared gradient"),
        (lambda gradient, share: 2 * squares(gradient.abs(), share) + 3, "One ring too far"),
        (lambda gradient, share: 2 * squares(gradient.abs(), share) + 2, "odd side"),
        (more_than_the_share, "returns None"),
    ],
    "01.4": [
        (lambda layers, output: holes(layers, output, "own"), "itself dilated"),
        (lambda layers, output: holes(layers, output, "none"), "No layer is dilated"),
        (lambda layers, output: holes(layers, output, "last"), "multiply"),
        (lambda layers, output: [(k, s, 1) for k, s in layers], "Nothing has changed"),
        (lambda layers, output: [(k, 1) for k, s in layers], "shape"),
    ],
    "01.5": [
        (lambda *maps: wrong_share(*maps, top="all", bottom="all"), "counted as errors"),
        (lambda *maps: wrong_share(*maps, top="known", bottom="all"), "still in the total"),
        (lambda *maps: wrong_share(*maps, top="known", bottom="near"), "error rate near borders"),
        (lambda *maps: wrong_share(*maps, top="known", bottom="pixels"), "number of pixels"),
        (lambda *maps: wrong_share(*maps, top="strict", bottom="known"), "<="),
    ],
}
