"""The mean-field explorer: change a setting or paint the unary, and watch every message change, in the browser.

    explore(image, logits, crf)        computed in the browser, exactly as `crf.trace` with filtering="exact"
    explore(image, logits, coupling)   the same on a small graph, beside the exact marginals by enumeration
    explore(trace)                     a stored trace, for what the browser cannot compute (lattice, contextual CRF)
    explore(a, b)                      two of them side by side, with one cursor, one iteration and one class

    Explorer          live: JupyterLab, VS Code, Colab; its traits follow the reader and can be set and observed
    embed_html        the same, as one self-contained piece of HTML: no kernel, no request to any host
    embed_notebook    a notebook with every explorer in it replaced by that HTML, for nbconvert or a site generator:
                      jupyter nbconvert --to html --HTMLExporter.preprocessors=pwlib.course.explorer.embed_notebook x

A notebook stores an explorer's data once, in its metadata's widget state (nbclient and JupyterLab save it there). To
strip other metadata and keep the explorers: `nbstripout --keep-output --keep-metadata-keys metadata.widgets`.
JupyterLab shows a stored explorer before any cell is run if the notebook is trusted; where nothing can show it, it asks
the reader to run the cell.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwlib.course.explorer.bundle import loader, script
from pwlib.course.explorer.packing import pack_problem, pack_trace
from pwlib.crf import DenseCRF
from pwlib.data import VOID
from pwlib.tools.dense import probabilities_from_labels
from pwlib.trace import Trace

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise ImportError("the explorer is a widget and needs anywidget: pip install anywidget ipywidgets") from error

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
STATE = ("meta", "iteration", "label", "pixel", "senders", "settings", "settings_b", "strokes")
LARGEST = 6400  # pixels: the browser keeps the kernel's N x N weights, 160 MB for so many
HEAVY = 6e6  # bytes; a notebook with more than this in it is slow to open
STILL = '<p class="still"><em>Mean-field explorer. Run this cell to use it.</em></p>'


class Explorer(anywidget.AnyWidget):
    """The widget `explore` returns.

    Traits, in step with the page and open to `observe`: `iteration` 0..T (0: the unary alone), `label` 0..K-1, `pixel`
    (row, column), `senders` "mass", "weights" or (of a pair) "none", `settings` (of a pair's second: `settings_b`),
    `strokes` as runs [label, first pixel, pixels]. A value out of range raises ValueError.

    To go on in Python from what is on show: `image`, `logits`, `crf` (or `coupling`), `painted`, and `trace()`.
    """

    _esm = loader()
    meta = traitlets.Dict().tag(sync=True)
    data = traitlets.Bytes().tag(sync=True)
    iteration = traitlets.Int(0).tag(sync=True)
    label = traitlets.Int(0).tag(sync=True)
    pixel = traitlets.Tuple(traitlets.Int(), traitlets.Int(), default_value=(0, 0)).tag(sync=True)
    senders = traitlets.Enum(["mass", "weights", "none"], default_value="mass").tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    settings_b = traitlets.Dict().tag(sync=True)
    strokes = traitlets.List().tag(sync=True)

    def __init__(self, **traits: Any):
        self.sources: tuple = traits.pop("sources", ())
        super().__init__(**traits)
        self.on_msg(self._answer)

    @property
    def _panes(self) -> list[dict]:
        return self.meta["panes"]

    @traitlets.validate("iteration", "label")
    def _in_range(self, proposal: dict) -> int:
        name, value = proposal["trait"].name, proposal["value"]
        last = len(self._panes[0]["classes"]) - 1
        if name == "iteration":
            computed = (self.settings, self.settings_b)
            last = max(s.get("iterations", p.get("iterations", 0)) for p, s in zip(self._panes, computed, strict=False))
        if not 0 <= value <= last:
            raise ValueError(f"{name} is {value}; this trace has {name}s 0 to {last}")
        return value

    @traitlets.validate("pixel")
    def _on_image(self, proposal: dict) -> tuple[int, int]:
        (row, column), (height, width) = proposal["value"], self._panes[0]["size"]
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"pixel is ({row}, {column}); expected (row, column) within {height} x {width}")
        return row, column

    @traitlets.validate("settings", "settings_b")
    def _known(self, proposal: dict) -> dict:
        panes = self._panes[1:] if proposal["trait"].name == "settings_b" else self._panes
        unknown = set(proposal["value"]) ^ set(panes[0].get("settings", {}) if panes else {})
        if unknown:
            raise ValueError(f"settings differ in {', '.join(sorted(unknown))}; change values, not names")
        return proposal["value"]

    def __repr__(self) -> str:
        pane, (height, width) = self._panes[0], self._panes[0]["size"]
        steps = self.settings.get("iterations", pane.get("iterations"))
        beside = f", beside {self._panes[1]['title']}" if len(self._panes) > 1 else ""
        return (
            f"Explorer({height} x {width} pixels, {len(pane['classes'])} labels, "
            f"{steps} iterations, kernels: {', '.join(pane['kernels'])}{beside})"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        if data is not None:
            data["text/html"] = STILL  # shown only where no widget can be
        return bundle

    # What is on show, for Python.

    @property
    def painted(self) -> Tensor:
        """int64 [H, W], the strokes: a label, or 255 where nothing is painted."""
        height, width = self._panes[0]["size"]
        flat = torch.full((height * width,), VOID)
        for label, start, length in self.strokes:
            flat[start : start + length] = label
        return flat.reshape(height, width)

    @property
    def image(self) -> Tensor:
        """float32 [3, H, W] in [0, 1], as the browser's kernels see it (the first of a pair)."""
        return self._image(0)

    @property
    def logits(self) -> Tensor:
        """float32 [K, H, W] with temperature, strokes and double softmax in them (the first of a pair)."""
        return self._logits(0)

    @property
    def crf(self) -> DenseCRF:
        """A `DenseCRF` with the present settings (the first of a pair)."""
        return self._crf(0)

    @property
    def coupling(self) -> Tensor:
        """float64 [N, N], a small graph's coupling matrix with the present settings."""
        settings, matrix = self.settings, self._source(0)[2].double() * self.settings["scale"]
        for i, j, value in settings["edges"]:
            matrix[i, j] = matrix[j, i] = value
        return matrix.fill_diagonal_(settings["self_weight"])

    def trace(self) -> Trace:
        """What `crf.trace` gives for the present settings and strokes."""
        return self._trace(0)

    def _source(self, pane: int) -> tuple:
        if not isinstance(self.sources[pane], tuple):
            raise ValueError("this explorer shows a stored trace; it has no settings to go on from")
        return self.sources[pane]

    def _settings(self, pane: int) -> dict:
        return self.settings_b if pane else self.settings

    def _image(self, pane: int) -> Tensor:
        image = self._source(pane)[0].detach().float().cpu()
        if self._settings(pane).get("normalised_colours"):
            normalised = (image - image.mean((1, 2), keepdim=True)) / image.std((1, 2), keepdim=True)
            return 0.5 + normalised / 255  # DenseCRF multiplies by 255 and expects [0, 1]; only differences count
        rounded = (255 * image).round() / 255
        return rounded if (rounded - image).abs().max() < 1e-6 else image.half().float()

    def _logits(self, pane: int) -> Tensor:
        settings, logits = self._settings(pane), self._source(pane)[1].detach().cpu().half().float()
        logits = logits / settings["temperature"]
        if self.strokes:
            logits = painted_logits(logits, self.painted, settings["confidence"])
        return torch.softmax(logits, 0) if settings["double_softmax"] else logits

    def _crf(self, pane: int) -> DenseCRF:
        settings = self._settings(pane)
        compatibility = torch.tensor(self._panes[pane]["compatibility"])
        if settings["sign"] == "reward":
            compatibility = compatibility.max() - compatibility
        names = ("iterations", "theta_alpha", "theta_beta", "theta_gamma", "w_bilateral", "w_spatial")
        chosen = {name: settings[name] for name in (*names, "normalization", "self_message")}
        filtering = self._source(pane)[2].filtering
        return DenseCRF(len(compatibility), **chosen, compatibility=compatibility, filtering=filtering)

    def _trace(self, pane: int) -> Trace:
        return self._crf(pane).trace(self._logits(pane), self._image(pane))

    def _answer(self, _: Any, content: dict, buffers: list) -> None:
        """Compute a pane that is too large for the browser with the settings it sends, and send the trace back."""
        if content.get("kind") == "compute":
            pane = int(content["pane"])
            setattr(self, "settings_b" if pane else "settings", content["settings"])
            self.strokes = content["strokes"]
            trace = replace(self._trace(pane), image=self._source(pane)[0].cpu())
            meta, data = pack_trace(trace, self._panes[pane]["classes"], None)
            self.send({"pane": pane, "meta": meta}, buffers=[data])

    def to_html(self) -> str:
        """This explorer as it stands, as self-contained HTML; see `embed_html`."""
        return embed_html(self)


def explore(
    *sources: Any,
    class_names: Sequence[str] | None = None,
    palette: np.ndarray | None = None,
    strokes: Tensor | None = None,
    truth: Tensor | None = None,
    titles: Sequence[str] = ("A", "B"),
    iterations: int | None = None,
    iteration: int | None = None,
    label: int | None = None,
    pixel: tuple[int, int] | None = None,
    senders: str | None = None,
) -> Explorer:
    """An explorer of one image's mean field, or of two side by side.

    Args:
        sources: `image, logits, crf`: image [3, H, W] in [0, 1], logits [K, H, W] and a `DenseCRF`, computed in the
            browser up to 6,400 pixels, beyond by the kernel on request. In place of the CRF a coupling matrix [N, N]
            makes a small graph with a Potts penalty. Or one `Trace`, from `DenseCRF.trace`, `ContextualCRF.trace` or
            made by hand (`features`, `sums` and `free_energy` may be missing). Or two sources to compare, each a
            `Trace`, an `Explorer` or a tuple (image, logits, crf), with the same size and labels.
        class_names: K of them; default "label 0", ...
        palette: uint8 [K, 3] or, with a last row for void, [K + 1, 3]; default: a colour-blind-safe one.
        strokes: int64 [H, W], labels painted on the image to begin with, 255 where there is none. They replace the
            unary there, as `probabilities_from_labels` does.
        truth: int64 [H, W], the true labels, 255 where unknown. A picture shows the wrong pixels (not of a pair).
        titles: what the two of a comparison are called.
        iterations: of mean field in the browser; default: the CRF's (10 on a graph).
        iteration: to begin with; 0 is the unary alone, t what the t-th update made of it. Default: the last, or 1 of a
            stored trace.
        label: the class to begin with; default: the one whose marginals mean field changes most.
        pixel: (row, column) to begin with; default: the pixel whose marginals change most.
        senders: "mass", a pixel's weight times its marginal, or "weights" alone. A pair shows either in place of its
            messages, or the messages with "none". Default: "none" of a pair, else "mass".
    """
    if len(sources) == 3 and isinstance(sources[0], Tensor):
        sources = (sources,)
    if len(sources) not in (1, 2):
        raise ValueError(f"explore got {len(sources)} sources; expected image, logits, crf, or one or two traces")
    sources = tuple(s.sources[0] if isinstance(s, Explorer) else s for s in sources)
    packed = [_pack(source, iterations, class_names, palette, strokes) for source in sources]
    panes, data, traces = [p[0] for p in packed], b"".join(p[1] for p in packed), [p[2] for p in packed]
    if any(p["size"] != panes[0]["size"] or len(p["classes"]) != len(panes[0]["classes"]) for p in panes):
        shapes = " and ".join(f"{p['size']} with {len(p['classes'])} labels" for p in panes)
        raise ValueError(f"the two sources differ in size or labels: {shapes}; expected the same")
    if truth is not None and list(truth.shape) != panes[0]["size"]:
        raise ValueError(f"truth has shape {list(truth.shape)}; expected {panes[0]['size']}")
    start = 0
    for pane, title in zip(panes, titles, strict=False):
        pane |= {"bytes": [start, pane["bytes"][1]], "title": str(title)}
        start += pane["bytes"][1]
    if len(data) > HEAVY:
        warnings.warn(f"this explorer holds {len(data) / 1e6:.0f} MB; a smaller image is easier to keep", stacklevel=2)
    settings = [pane.get("settings", {}) for pane in panes]
    change = (traces[-1][-1] - traces[0][0]).abs()
    meta = {"panes": panes, "truth": "" if truth is None else json.dumps(runs(truth), separators=(",", ":"))}
    explorer = Explorer(
        meta=meta, data=data, settings=settings[0], settings_b=settings[1] if len(settings) > 1 else {},
        strokes=[] if strokes is None else runs(strokes), sources=sources,
    )  # fmt: skip
    last = max(s.get("iterations", p.get("iterations")) for s, p in zip(settings, panes, strict=True))
    if iteration is None:
        iteration = last if settings[0] else min(1, last)
    explorer.iteration = iteration
    explorer.label = int(change.sum((1, 2)).argmax()) if label is None else label
    explorer.pixel = divmod(int(change.sum(0).argmax()), change.shape[-1]) if pixel is None else tuple(pixel)
    explorer.senders = senders or ("none" if len(panes) > 1 else "mass")
    return explorer


def runs(labels: Tensor) -> list[list[int]]:
    """The labelled pixels of [H, W] as runs [label, first pixel, pixels], row by row; 255 is none."""
    flat = labels.flatten()
    starts = [0, *(1 + torch.nonzero(flat[1:] != flat[:-1]).flatten()).tolist(), len(flat)]
    return [[int(flat[a]), a, b - a] for a, b in itertools.pairwise(starts) if flat[a] != VOID]


def _pack(
    source: Any, iterations: int | None, class_names: Any, palette: Any, strokes: Tensor | None
) -> tuple[dict, bytes, Tensor]:
    """Description, data, and first and last marginals [2, K, H, W], which tell where to look first."""
    if isinstance(source, Trace):
        return *pack_trace(source, class_names, palette), source.q[[0, -1]]
    if not (isinstance(source, tuple) and len(source) == 3):
        raise ValueError(f"cannot explore a {type(source).__name__}; expected a Trace or (image, logits, crf)")
    image, logits, model = source
    meta, data = pack_problem(image, logits, model, iterations, class_names, palette)
    if strokes is not None:
        logits = painted_logits(logits, strokes, meta["settings"]["confidence"])
    steps, first = meta["settings"]["iterations"], torch.softmax(logits.detach().cpu().float(), 0)
    if not isinstance(model, DenseCRF):
        return meta, data, torch.stack([first, torch.full_like(first, 1 / len(first))])
    if image.shape[1] * image.shape[2] > LARGEST:
        trace = model.trace(logits, image, iterations=steps)
        stored, data = pack_trace(replace(trace, image=image.cpu()), class_names, palette)
        return stored | {"settings": meta["settings"], "potts": meta["potts"], "remote": True}, data, trace.q[[0, -1]]
    q = model.marginals(logits[None], image[None], iterations=min(steps, 3))[0]
    return meta, data, torch.stack([first, q.cpu()])


def painted_logits(logits: Tensor, labels: Tensor, confidence: float) -> Tensor:
    """Logits [K, H, W] that are those of `probabilities_from_labels` where labels [H, W] are not 255."""
    drawn = probabilities_from_labels(labels, len(logits), confidence=confidence).log().to(logits)
    return torch.where((labels != VOID).to(logits.device), drawn, logits)


# ---------------------------------------------------------------------------------------------------------------------
# Without a kernel


def embed_html(source: Explorer | Trace | Mapping[str, Any], *, code: bool = True, **options: Any) -> str:
    """Self-contained HTML of an explorer: markup, style, script and data in one piece, for any page.

    Args:
        source: an `Explorer`; a `Trace` (then `options` are those of `explore`); or a widget's saved state, one entry
            of `metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]` of an executed notebook.
        code: whether to include the script; a second explorer of the same page can use the first one's.
    """
    if isinstance(source, Trace):
        source = explore(source, **options)
    if isinstance(source, Explorer):
        values = {name: getattr(source, name) for name in STATE}
        data = base64.b64encode(source.data).decode()
    elif is_explorer(source):
        values = {name: source["state"][name] for name in STATE}
        data = next(b["data"] for b in source["buffers"] if b["path"] == ["data"])
    else:
        raise ValueError("expected an Explorer, a Trace, or the saved state of an explorer widget")
    state = json.dumps(values | {"data": data}, separators=(",", ":")).replace("</", "<\\/")
    program = script().replace("export default { render };", "globalThis.pwlibExplorer = { render, stillModel };")
    return (
        '<div class="pwlib-explorer"><noscript>The mean-field explorer needs JavaScript.</noscript></div>\n'
        "<script>(() => {\nconst host = document.currentScript.previousElementSibling;\n"
        + (program.replace("</", "<\\/") if code else "")
        + f"pwlibExplorer.render({{ model: pwlibExplorer.stillModel({state}), el: host }});\n}})();</script>"
    )


def is_explorer(entry: Mapping[str, Any]) -> bool:
    """Whether one entry of a notebook's widget state is an explorer's."""
    return str(entry.get("state", {}).get("_anywidget_id", "")).endswith("explorer.Explorer")


def embed_notebook(notebook: Any, resources: Any = None) -> Any:
    """A copy of an executed notebook (nbformat's) in which every explorer is an HTML output that needs no kernel.

    Other widgets' saved state stays. With `resources` it returns both, as nbconvert's preprocessors do.
    """
    notebook = copy.deepcopy(notebook)
    saved = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    explorers = {model: entry for model, entry in saved.items() if is_explorer(entry)}
    code = True
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(WIDGET_VIEW, {})
            if view.get("model_id") in explorers:
                html = embed_html(explorers[view["model_id"]], code=code)
                code = False
                output["data"] = {"text/html": html, "text/plain": output["data"].get("text/plain", "Explorer")}
    for model, entry in explorers.items():
        del saved[model]
        saved.pop(entry["state"].get("layout", "").removeprefix("IPY_MODEL_"), None)
    if not saved:
        notebook.metadata.pop("widgets", None)
    return notebook if resources is None else (notebook, resources)
