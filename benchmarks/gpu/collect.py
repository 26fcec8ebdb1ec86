"""Turn the results of the two runs into Markdown tables, curves and one checkpoint.

python benchmarks/gpu/collect.py RESULTS_A RESULTS_B           tables of whatever is there
python benchmarks/gpu/collect.py RESULTS_B --curves FILE.svg   also draws validation mIoU against epochs
python benchmarks/gpu/collect.py RESULTS_A RESULTS_B --store FOLDER    also keeps them, without scores of single classes
python benchmarks/gpu/collect.py RESULTS_B --join FILE.pt      also joins camvid.pt.0, camvid.pt.1, ... to one file
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is aligned to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, but all digits before the point; a dash for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def steps(content: dict) -> str:
    """How long each step of a run took, and how it ended."""
    names = {0: "passed", 124: "stopped at its limit", 137: "stopped at its limit"}
    rows = [
        [step["name"], str(step["seconds"]), str(step["limit"]), names.get(step["status"], f"status {step['status']}")]
        for step in content["steps"]
    ]
    title = f"Run {content['run']}, {content['total_seconds']} s"
    return f"{title}\n\n{table(['step', 'seconds', 'limit', 'result'], rows)}"


def crf(content: dict) -> str:
    """Milliseconds, memory and agreement, one row a measurement, with the ratio to pydensecrf2 on the same problem."""
    problems = {(r["height"], r["width"], r["labels"]) for r in content["rows"]}
    peer = {
        problem: row["ms"]
        for problem in problems
        for row in content["rows"]
        if (row["contender"], row["height"], row["width"], row["labels"]) == ("pydensecrf2", *problem) and "ms" in row
    }
    rows = []
    for row in content["rows"]:
        problem = (row["height"], row["width"], row["labels"])
        ratio = peer[problem] / row["ms"] if problem in peer and row["task"] == "forward" and "ms" in row else None
        same = row.get("against exact", row.get("against lattice", {})).get("same_labels")
        time = number(row["ms"]) if "ms" in row else row.get("skipped", row.get("error", "-")[:60])
        size = f"{row['height']}x{row['width']}, K = {row['labels']}"
        rows.append(
            [
                row["contender"],
                row["task"],
                size,
                str(row.get("iterations", "-")),
                time,
                number(row.get("peak_mb")),
                number(ratio),
                percent(same),
            ]
        )
    header = ["method", "task", "image", "iterations", "ms", "peak MB", "times as fast as pydensecrf2", "% same labels"]
    title = f"Dense CRF on {content['gpu'] or 'the CPU'}, torch {content['torch']}"
    note = "The last column compares with exact filtering, or with the lattice in the rows of exact filtering."
    return f"{title}\n\n{table(header, rows)}\n\n{note}"


def reason(text: str) -> str:
    """The line of a report that says what went wrong: pytest's first "E" line, or the last line."""
    lines = text.strip().splitlines() or ["no text"]
    return next((line for line in lines if line.startswith("E ")), lines[-1]).removeprefix("E ").strip()[:200]


def pytest_run(name: str, content: dict) -> str:
    """Minutes and outcomes per file, and a line for every failure."""
    keys = ("passed", "failed", "skipped")
    rows = [
        [file, f"{one['minutes']:.2f}", *(str(one.get(key, 0)) for key in keys)]
        for file, one in content["files"].items()
    ]
    if name != "notebooks":  # of the many test files, only those that failed, and the sum
        sums = [str(sum(one.get(key, 0) for one in content["files"].values())) for key in keys]
        minutes = sum(one["minutes"] for one in content["files"].values())
        rows = [row for row in rows if row[3] != "0"] + [["all", f"{minutes:.2f}", *sums]]
    failures = "\n".join(f"- {f['test']}: {reason(f['text'])}" for f in content["failures"])
    state = "stopped before the end" if content["exit_status"] is None else f"exit status {content['exit_status']}"
    title = f"{name.capitalize()}, {content['wall_seconds']:.0f} s of wall time, {state}"
    return "\n\n".join(filter(None, [title, table(["file", "minutes", *keys], rows), failures]))


def curve(records: list[dict]) -> Iterator[tuple[int, str, dict]]:
    """(epoch, part, scores) of all validated epochs of one stage."""
    for record in records:
        for part, scores in record.get("val", {}).items():
            yield record["epoch"], part, scores


def stages(title: str, history: dict) -> str:
    """First, best and last epoch of every stage and part; best is chosen by the validation scores themselves."""
    rows = []
    for stage in sorted(name for name in history if name.startswith("stage")):
        for part in dict.fromkeys(part for _, part, _ in curve(history[stage])):
            scored = [(epoch, scores) for epoch, name, scores in curve(history[stage]) if name == part]
            best = max(scored, key=lambda one: one[1]["miou"] or 0)
            for what, (epoch, scores) in (("first", scored[0]), ("best", best), ("last", scored[-1])):
                values = [percent(scores[key]) for key in ("miou", "pixel_accuracy", "boundary_iou")]
                rows.append([f"{stage} {part}", what, str(epoch), *values])
    header = ["stage and part", "epoch", "number", "mIoU", "pixel accuracy", "boundary IoU"]
    return f"{title}\n\n{table(header, rows)}"


def camvid(content: dict) -> str:
    """The recipes that were tried, and every stage's scores."""
    trials = [
        [name, percent(t["held_out_miou"]), number(t.get("epoch_seconds"))]
        for name, t in content.get("trials", {}).items()
    ]
    parts = [f"CamVid {content['size'][0]}x{content['size'][1]} on {content['device']}, epochs {content.get('epochs')}"]
    parts += [table(["recipe", "mIoU on held-out training images", "seconds per epoch"], trials)]
    return "\n\n".join([*parts, stages("Validation scores, in percent:", content.get("history", {}))])


def curves(contents: dict[str, dict], path: Path) -> None:
    """Validation mIoU against epochs: stage 1, stages 2 and 3, and the contextual CRF behind the network of stage 1."""
    from pwlib.course.plots import COLOURS, figure

    camvid, context = (contents.get(name, {}).get("history", {}) for name in ("camvid", "context"))
    panels = {"stage 1": (camvid, ["stage1"]), "stages 2 and 3": (camvid, ["stage2", "stage3"])}
    panels["contextual CRF"] = (context, ["stage2"])
    styles = {
        "unary": ("network", "blue"),
        "context": ("contextual CRF", "green"),
        "crf": ("with dense CRF", "vermilion"),
    }
    fig, (row,) = figure(1, 3, figsize=(8.5, 3.4), sharey=True, width_ratios=(3, 2, 2))
    for axes, (title, (history, names)) in zip(row, panels.items(), strict=True):
        start, labelled = 0, set()
        for name in names:
            found = list(curve(history.get(name, [])))
            for part in dict.fromkeys(part for _, part, _ in found):
                points = [(start + epoch, 100 * (s["miou"] or 0)) for epoch, other, s in found if other == part]
                label, colour = styles[part]
                one = {"label": label} if label not in labelled else {}
                axes.plot(*zip(*points, strict=True), color=COLOURS[colour], marker=".", ms=4, lw=1.2, **one)
                labelled.add(label)
            start += max((epoch for epoch, _, _ in found), default=0)
            if name != names[-1]:
                axes.axvline(start, color="0.8", lw=0.8, zorder=0)
        axes.set(title=title, xlabel="epoch")
        if labelled:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    row[0].set_ylabel("validation mIoU, %")
    fig.savefig(path)


def stored(content: dict) -> dict:
    """A result without what no table shows: scores of single classes, and all of a failure's report but its reason."""
    if "failures" in content:
        failures = [f | {"text": reason(f["text"])} for f in content["failures"]]
        content = content | {"failures": failures}
    text = json.dumps(content)
    return json.loads(text, object_hook=lambda one: {k: v for k, v in one.items() if not k.startswith("per_class")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="folders that run.sh wrote")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="draw the validation curves")
    parser.add_argument("--join", type=Path, metavar="FILE", help="join the checkpoint's parts")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="write the results there, without details")
    args = parser.parse_args()
    files = [path for folder in args.results for path in sorted(folder.glob("*.json"))]
    everything = [(path.stem, json.loads(path.read_text())) for path in files]
    contents = {name: content for name, content in everything if not name.startswith("run")}
    runs = [content for name, content in everything if name.startswith("run")]
    printed = [steps(content) for content in runs]
    for name, content in contents.items():
        if name == "crf":
            printed.append(crf(content))
        elif name == "camvid":
            printed.append(camvid(content))
        elif name == "context":
            printed.append(stages("Contextual CRF, validation scores in percent:", content["history"]))
        else:
            printed.append(pytest_run(name, content))
    print("\n\n".join(printed))
    if args.curves:
        curves({name: contents[name] for name in ("camvid", "context") if name in contents}, args.curves)
    if args.store:
        args.store.mkdir(parents=True, exist_ok=True)
        for name, content in (contents | {f"run-{content['run']}": content for content in runs}).items():
            (args.store / f"{name}.json").write_text(json.dumps(stored(content), indent=1) + "\n")
    if args.join:
        parts = sorted(
            (p for folder in args.results for p in folder.glob("camvid.pt.*")), key=lambda p: int(p.suffix[1:])
        )
        args.join.write_bytes(b"".join(part.read_bytes() for part in parts))


if __name__ == "__main__":
    main()
