"""An explorer in a page as its reader sees it: what the table, the pictures and the toolbar show."""

import math
import re

import matplotlib
import numpy as np
import torch

PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    '<title>Explorer</title><body style="{style}">{html}'
)


def drawn(page) -> None:
    """Wait until the explorer is there and has drawn its last change."""
    page.wait_for_selector(".explorer canvas[aria-label]")
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_selector(".explorer[data-drawn=true]")


def numbers(text: str) -> float:
    return float(text.replace("−", "-"))


def table(page) -> np.ndarray:
    """[K, columns] as the reader sees it, but for the last one, the numbers of pixels; a dash is nan."""
    drawn(page)
    rows = page.locator(".explorer tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.querySelectorAll('td:not(:last-child)')].map(cell => cell.textContent))"
    )
    return np.array([[math.nan if cell == "–" else numbers(cell) for cell in row] for row in rows])


def expected(trace, t: int, row: int, column: int) -> np.ndarray:
    """The same from the trace: unary, a message a kernel, pairwise, unary + pairwise, q."""
    at = (..., row, column)
    unary, q = trace.unary[at], trace.q[t][at]
    if t == 0:
        none = torch.full((trace.messages.shape[1] + 1, len(q)), math.nan)
        return torch.stack([unary, *none, unary, q], 1).numpy()
    pairwise = trace.pairwise[t - 1][at]
    return torch.stack([unary, *trace.messages[t - 1][at], pairwise, unary + pairwise, q], 1).numpy()


# Half precision, and three decimals (fewer above 10) on the page.
CLOSE = {"rtol": 2e-3, "atol": 2e-3}


def where(page) -> tuple[int, int]:
    drawn(page)
    row, column = re.search(r"pixel \((\d+), (\d+)\)", page.locator(".explorer caption").inner_text()).groups()
    return int(row), int(column)


def iteration(page) -> int:
    drawn(page)
    return int(re.search(r"iteration (\d+) of", page.locator(".explorer output").inner_text()).group(1))


def hover(page, panel: str, trace, row: int, column: int, click: bool = False) -> None:
    height, width = trace.q.shape[-2:]
    box = page.locator(f"canvas[data-panel={panel}]").bounding_box()
    x, y = box["x"] + (column + 0.5) * box["width"] / width, box["y"] + (row + 0.5) * box["height"] / height
    page.mouse.move(x, y)
    if click:
        page.mouse.click(x, y)
    drawn(page)


def colours(page, panel: str) -> np.ndarray:
    """The panel's pixels, uint8 [H, W, 3]."""
    drawn(page)
    width, height, data = page.locator(f"canvas[data-panel={panel}]").evaluate(
        "c => [c.width, c.height, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
    )
    return np.array(data, np.uint8).reshape(height, width, 4)[..., :3]


def painted(values, low: float, high: float, cmap: str) -> np.ndarray:
    scaled = (np.asarray(values, np.float64) - low) / (high - low)
    return (255 * matplotlib.colormaps[cmap](scaled)[..., :3]).round()
