"""The mean-field explorer: a trace you can step through, in a notebook or in a page without a kernel.

`explore(trace)` returns a widget. Everything it shows is drawn in the browser (`explore.js`) from one block of binary
data: float16 for the unary energies, the messages and the marginals; the pairwise term, the entropy and the weights
with which pixels send their mass to one another are worked out there. So a saved widget needs no Python behind it:

    Explorer          live: JupyterLab, VS Code, Colab; `iteration`, `label`, `pixel` and `senders` are traits that
                      follow the reader's hand and can be set and observed from Python
    embed_html        the same, as one self-contained piece of HTML: no kernel, no request to any host
    embed_notebook    a notebook with every explorer in it replaced by that HTML, for nbconvert or a site generator:
                      jupyter nbconvert --to html --HTMLExporter.preprocessors=pwlib.course.explore.embed_notebook x

A notebook stores an explorer's data once, in its metadata's widget state (nbclient and JupyterLab save it there). To
strip other metadata and keep the explorers: `nbstripout --keep-output --keep-metadata-keys metadata.widgets`.
JupyterLab shows a stored explorer before any cell is run if the notebook is trusted; otherwise its one-line text.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pwlib.course.plots import label_colours, most_changed, to_uint8
from pwlib.trace import Trace

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError("the explorer is a widget and needs anywidget: pip install anywidget ipywidgets") from error

HERE = Path(__file__).parent
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
VIEW_STATE = ("iteration", "label", "pixel", "senders")
HEAVY = 6e6  # bytes; a notebook with more than this in it is slow to open


class Explorer(anywidget.AnyWidget):
    """The widget `explore` returns.

    Traits, in step with the page and open to `observe`: `iteration` 0..T (0: the unary alone), `label` 0..K-1, `pixel`
    (row, column), `senders` "mass" or "weights". A value out of range raises ValueError.
    """

    _esm = HERE / "explore.js"
    _css = HERE / "explore.css"
    meta = traitlets.Dict().tag(sync=True)
    data = traitlets.Bytes().tag(sync=True)
    iteration = traitlets.Int(0).tag(sync=True)
    label = traitlets.Int(0).tag(sync=True)
    pixel = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)
    senders = traitlets.Enum(["mass", "weights"], default_value="mass").tag(sync=True)

    @traitlets.validate("iteration", "label")
    def _in_range(self, proposal: dict) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        last = self.meta["iterations"] if name == "iteration" else len(self.meta["classes"]) - 1
        if not 0 <= value <= last:
            raise ValueError(f"{name} is {value}; this trace has {name}s 0 to {last}")
        return value

    @traitlets.validate("pixel")
    def _on_image(self, proposal: dict) -> tuple[int, int]:
        (row, column), (height, width) = proposal["value"], self.meta["size"]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel is ({row}, {column}); expected (row, column) within {height} x {width}")
        return row, column

    def __repr__(self) -> str:
        height, width = self.meta["size"]
        return (
            f"Explorer({height} x {width} pixels, {len(self.meta['classes'])} labels, "
            f"{self.meta['iterations']} iterations, kernels: {', '.join(self.meta['kernels'])})"
        )

    def to_html(self) -> str:
        """This explorer as it stands, as self-contained HTML; see `embed_html`."""
        return embed_html(self)


def explore(
    trace: Trace,
    *,
    class_names: Sequence[str] | None = None,
    palette: np.ndarray | None = None,
    iteration: int | None = None,
    label: int | None = None,
    pixel: tuple[int, int] | None = None,
    senders: str = "mass",
) -> Explorer:
    """An explorer of one image's mean field.

    Args:
        trace: from `DenseCRF.trace` or `ContextualCRF.trace`, or made by hand. `features` and `sums` may be missing
            (who sends to a pixel is then not shown), `free_energy` too (None); where the pairwise term is not
            compatibility @ weighted messages it is stored as it is.
        class_names: K of them; default "label 0", ...
        palette: uint8 [K, 3] or, with a last row for void, [K + 1, 3]; default: a colour-blind-safe one.
        iteration: to begin with; 0 is the unary alone, t what the t-th update made of it. Default: 1.
        label: the class to begin with; default: the one whose marginals mean field changes most.
        pixel: (row, column) to begin with; default: the pixel whose marginals change most.
        senders: "mass", a pixel's weight times its marginal, or "weights" alone.
    """
    meta, data = pack(trace, class_names, palette)
    if len(data) > HEAVY:
        warnings.warn(f"this explorer holds {len(data) / 1e6:.0f} MB; a smaller image is easier to keep", stacklevel=2)
    label = most_changed(trace) if label is None else label
    if pixel is None:
        pixel = divmod(int((trace.q[-1] - trace.q[0]).abs().sum(0).argmax()), trace.q.shape[-1])
    explorer = Explorer(meta=meta, data=data)
    explorer.iteration = min(1, meta["iterations"]) if iteration is None else iteration
    explorer.label, explorer.pixel, explorer.senders = label, tuple(pixel), senders
    return explorer


# ---------------------------------------------------------------------------------------------------------------------
# The data: one gzip of named blocks. Each block's words are stored as differences from one iteration to the next (mean
# field converges, so most of them vanish) and bytewise, all low bytes first. Nothing is lost but float16's rounding.


def pack(trace: Trace, class_names: Sequence[str] | None, palette: np.ndarray | None) -> tuple[dict, bytes]:
    """What the page needs: a JSON-ready description, and the data."""
    classes, height, width = trace.unary.shape
    steps, kernels = trace.messages.shape[:2]
    if trace.q.shape != (steps + 1, classes, height, width) or len(trace.kernels) != kernels:
        raise ValueError(
            f"the trace's parts disagree: unary {list(trace.unary.shape)}, messages {list(trace.messages.shape)}, "
            f"q {list(trace.q.shape)}, {len(trace.kernels)} kernel names"
        )
    names = [f"label {k}" for k in range(classes)] if class_names is None else [str(n) for n in class_names]
    if len(names) != classes:
        raise ValueError(f"class_names has {len(names)} names; this trace has {classes} labels")
    blocks: dict[str, np.ndarray] = {
        "image": to_uint8(trace.image),
        "unary": half(trace.unary),
        "messages": half(trace.messages),
        "q": half(trace.q),
        "labels": trace.labels.byte().numpy(),
    }
    if not follows(trace):
        blocks["pairwise"] = half(trace.pairwise)
    if trace.features and trace.sums is not None:
        blocks["sums"] = trace.sums.float().numpy()
        blocks |= {f"features{m}": rows.float().numpy() for m, rows in enumerate(trace.features)}
    free = [] if trace.free_energy is None else [float(f) for f in trace.free_energy]
    meta = {
        "size": [height, width],
        "iterations": steps,
        "kernels": list(trace.kernels),
        "classes": names,
        "colours": ["#" + bytes(c).hex() for c in label_colours(classes, palette).tolist()],
        "weights": [] if trace.weights is None else trace.weights.tolist(),
        "compatibility": [] if trace.compatibility is None else trace.compatibility.tolist(),
        "free_energy": [f if math.isfinite(f) else None for f in free],
        "normalization": trace.normalization,
        "self_message": trace.self_message,
        "blocks": [{"name": n, "dtype": b.dtype.name, "shape": list(b.shape)} for n, b in blocks.items()],
    }
    raw = b"".join(shuffled(block, differences=name in {"messages", "q", "labels"}) for name, block in blocks.items())
    return meta, gzip.compress(raw, 6, mtime=0)


def half(values: torch.Tensor) -> np.ndarray:
    """float16, saturating rather than infinite."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half().numpy()


def shuffled(block: np.ndarray, *, differences: bool) -> bytes:
    words = np.ascontiguousarray(block).view(f"<u{block.itemsize}")
    if differences:
        words = np.concatenate([words[:1], words[1:] - words[:-1]])  # modulo 2^16, and back in the browser
    return words.reshape(-1, 1).view(np.uint8).T.tobytes()


def follows(trace: Trace) -> bool:
    """Whether the pairwise term is compatibility @ sum_m w_m message_m, so that the page can work it out."""
    if trace.weights is None or trace.compatibility is None:
        return False
    made = torch.einsum("kl,m,tmlhw->tkhw", trace.compatibility, trace.weights, trace.messages)
    return torch.allclose(made, trace.pairwise, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Without a kernel


def embed_html(source: Explorer | Trace | Mapping[str, Any], **options: Any) -> str:
    """Self-contained HTML of an explorer: markup, style, script and data in one piece, for any page.

    Args:
        source: an `Explorer`; a `Trace` (then `options` are those of `explore`); or a widget's saved state, one entry
            of `metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]` of an executed notebook.
    """
    if isinstance(source, Trace):
        source = explore(source, **options)
    if isinstance(source, Explorer):
        values = {name: getattr(source, name) for name in ("meta", *VIEW_STATE)}
        data = base64.b64encode(source.data).decode()
    elif is_explorer(source):
        values = {name: source["state"][name] for name in ("meta", *VIEW_STATE)}
        data = next(b["data"] for b in source["buffers"] if b["path"] == ["data"])
    else:
        raise ValueError("expected an Explorer, a Trace, or the saved state of an explorer widget")
    values |= {"data": data, "_css": (HERE / "explore.css").read_text("utf-8")}
    script = (HERE / "explore.js").read_text("utf-8").replace("export default", "const explorer =")
    state = json.dumps(values, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<div class="pwlib-explorer"><noscript>The mean-field explorer needs JavaScript.</noscript></div>\n'
        "<script>(() => {\nconst host = document.currentScript.previousElementSibling;\n"
        f"{script}\nexplorer.render({{ model: stillModel({state}), el: host }});\n}})();</script>"
    )


def is_explorer(entry: Mapping[str, Any]) -> bool:
    """Whether one entry of a notebook's widget state is an explorer's."""
    return str(entry.get("state", {}).get("_anywidget_id", "")).endswith("explore.Explorer")


def embed_notebook(notebook: Any, resources: Any = None) -> Any:
    """A copy of an executed notebook (nbformat's) in which every explorer is an HTML output that needs no kernel.

    Other widgets' saved state stays. With `resources` it returns both, as nbconvert's preprocessors do.
    """
    notebook = copy.deepcopy(notebook)
    saved = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    explorers = {model: entry for model, entry in saved.items() if is_explorer(entry)}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(WIDGET_VIEW, {})
            if view.get("model_id") in explorers:
                html = embed_html(explorers[view["model_id"]])
                output["data"] = {"text/html": html, "text/plain": output["data"].get("text/plain", "Explorer")}
    for model, entry in explorers.items():
        del saved[model]
        saved.pop(entry["state"].get("layout", "").removeprefix("IPY_MODEL_"), None)
    if not saved:
        notebook.metadata.pop("widgets", None)
    return notebook if resources is None else (notebook, resources)
