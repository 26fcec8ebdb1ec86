"""Check what tests cannot: configuration, texts, tables in READMEs, stored notebooks. Run by `make lint`.

Prints one line per fault, "file: what is wrong", and exits with 1 if there is one.
"""

import contextlib
import itertools
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

import nbformat
import notebook_rules
import yaml
from notebook_rules import ROOT

from pwlib.cli.parser import parser
from pwlib.course import checks

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # installed with pytest

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
BENCHMARKS = ROOT / "benchmarks"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCUMENTS = [*ROOT.glob("*.md"), *BENCHMARKS.rglob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"]
LABS = ROOT / "notebooks" / "labs"


def extras(command: str) -> set[str]:
    """Return the extras in a pip command: {"notebooks", "test"} for `.[notebooks,test]`."""
    found = re.search(r"\.\[([\w,\s-]+)\]", command)
    return {name.strip() for name in found[1].split(",")} if found else set()


# ------------------------------------------------------------------------------------------------- configuration


def environment() -> Iterator[str]:
    """The conda environment takes Python's and PyTorch's oldest versions and all other packages from pyproject.toml."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    bounds = dict(re.match(r"([\w-]+)(.*)", entry).groups() for entry in PROJECT["dependencies"])
    torch = [f"pytorch-cpu{bounds['torch']}", f"torchvision{bounds['torchvision']}"]
    wanted = [f"python{PROJECT['requires-python']}", *torch, "pip", {"pip": ["-e .[notebooks]"]}]
    found = conda["dependencies"]
    if conda["name"] != PROJECT["name"] or [found[0].partition(",")[0], *found[1:]] != wanted:
        yield f"environment.yml: has {conda['name']}, {found}; expected {PROJECT['name']}, {wanted}"


def makefile() -> Iterator[str]:
    """Every target is phony and has a line of help."""
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    explained = set(re.findall(r"^([a-z][\w-]*):.*## \w", MAKEFILE, re.M))
    for target in sorted(TARGETS ^ phony):
        yield f"Makefile: {target} is only a target, or only in .PHONY"
    for target in sorted(TARGETS - explained):
        yield f"Makefile: {target} has no help after ##"
    for name in sorted(set(" ".join(re.findall(r"install\.py ([a-z ]+)", MAKEFILE)).split()) - EXTRAS):
        yield f"Makefile: pyproject.toml has no extra {name}"


def workflows() -> Iterator[str]:
    """Workflows call existing targets and extras, and test the oldest Python and torch that pyproject.toml allows."""
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
            if "timeout-minutes" not in job:
                yield f"{path.name}: a job has no timeout-minutes"
            for command in (step.get("run", "") for step in job["steps"]):
                for target in sorted(set(re.findall(r"\bmake ([\w-]+)", command)) - TARGETS):
                    yield f"{path.name}: the Makefile has no target {target}"
                for name in sorted(extras(command) - EXTRAS):
                    yield f"{path.name}: pyproject.toml has no extra {name}"
    text = (ROOT / ".github" / "workflows" / "cpu.yml").read_text("utf-8")
    oldest = [re.match(r"(torch|torchvision)>=([\d.]+)", entry) for entry in PROJECT["dependencies"]]
    pins = [f'"{found[1]}=={found[2]}.*"' for found in oldest if found]
    for pin in [*pins, f'"{PROJECT["requires-python"].removeprefix(">=")}"']:
        if pin not in text:
            yield f"cpu.yml: does not test {pin}, the oldest version that pyproject.toml allows"


# --------------------------------------------------------------------------------------------- READMEs and tables


def documents() -> Iterator[str]:
    """Links, and the files and names of pwlib in `code`, exist; commands of `python -m pwlib` parse."""
    for path in [*DOCUMENTS, LABS / "INSTRUCTOR.md"]:
        text, name = path.read_text("utf-8"), path.relative_to(ROOT)
        prose = notebook_rules.FENCE.sub("", text)
        for target in re.findall(r"\]\(([^):#]+)\)", prose):
            if not (path.parent / target).exists():
                yield f"{name}: links to {target}, which does not exist"
        yield from (f"{name}: names {missing}, which does not exist" for missing in notebook_rules.missing_names(prose))
        for line in re.findall(r"^ *python -m pwlib (.*)$", text, re.M):
            arguments = shlex.split(re.sub(r"\$\w+", "0", line).translate({ord("["): "", ord("]"): ""}), comments=True)
            try:
                with contextlib.redirect_stderr(None):
                    parser(arguments).parse_args(arguments)
            except SystemExit:
                yield f"{name}: `python -m pwlib {line}` is not a valid command"


def sources() -> Iterator[str]:
    """Names of pwlib in the code, comments and docstrings of library, benchmarks and docs exist."""
    for path in (path for folder in ("pwlib", "benchmarks", "docs") for path in sorted((ROOT / folder).rglob("*.py"))):
        for name in sorted(set(notebook_rules.DOTTED.findall(path.read_text("utf-8")))):
            if not notebook_rules.resolves(name):
                yield f"{path.relative_to(ROOT)}: names {name}, which does not exist"


def tables() -> Iterator[str]:
    """Tables and figures in READMEs are those of the stored results."""
    readme = (ROOT / "README.md").read_text("utf-8")
    pipeline = runpy.run_path(str(BENCHMARKS / "pipeline" / "run.py"))
    scores = pipeline["table"](pipeline["stored"]())
    for path in (ROOT / "README.md", BENCHMARKS / "pipeline" / "README.md"):
        if scores not in path.read_text("utf-8"):
            yield f"{path.relative_to(ROOT)}: its scores are not the output of benchmarks/pipeline/run.py --table"
    ablation = runpy.run_path(str(BENCHMARKS / "ablation" / "run.py"))
    if ablation["table"](ablation["stored"]()) not in (BENCHMARKS / "ablation" / "README.md").read_text("utf-8"):
        yield "benchmarks/ablation/README.md: its tables are not the output of benchmarks/ablation/run.py --table"
    for folder in ("small_grid", "repeated_training"):
        text = (BENCHMARKS / folder / "README.md").read_text("utf-8")
        table = runpy.run_path(str(BENCHMARKS / folder / "run.py"))["table"]
        for path in (BENCHMARKS / folder).glob("*.json"):
            for line in table(json.loads(path.read_text("utf-8"))["runs"]).splitlines():
                if line not in text:
                    yield f"benchmarks/{folder}/README.md: lacks this line of {path.name}: {line}"
    yield from message_passing(readme, (BENCHMARKS / "crf" / "README.md").read_text("utf-8"))


def results() -> Iterator[str]:
    """Stored results name the machine and the commit that they were measured with."""
    for path in sorted(BENCHMARKS.glob("*/*.json")):  # those of a GPU, in gpu/results, come from an archive without git
        content = json.loads(path.read_text("utf-8"))
        runs = content.get("runs", [])
        runs = list(runs.values()) if isinstance(runs, dict) else runs
        for key in ("machine", "commit"):
            if key not in content and not (runs and all(key in run for run in runs)):
                yield f"{path.relative_to(ROOT)}: does not store the {key}"


def message_passing(readme: str, details: str) -> Iterator[str]:
    """The times of message passing: ratios of five runs in benchmarks/crf/README.md, the middle one in both READMEs."""
    files = [BENCHMARKS / "crf" / f"reference-{run}.json" for run in range(1, 6)]
    runs = [json.loads(path.read_text("utf-8"))["rows"] for path in files]
    columns = {"set-up": "set_up_ms", "set-up, next image": "next_set_up_ms", "one iteration": "iteration_ms"}
    rows = [
        f"| {name} | {' | '.join(f'{peer[key] / ours[key]:.2f}' for ours, peer in runs)} |"
        for name, key in (columns | {"total": "total_ms"}).items()
    ]
    memory = " | ".join(f"{ours['peak_mb'] / peer['peak_mb']:.2f}" for ours, peer in runs)
    rows.append(f"| peak memory, times the peer's | {memory} |")
    yield from (f"benchmarks/crf/README.md: lacks the row {row}" for row in rows if row not in details)
    middle = sorted(runs, key=lambda run: run[1]["total_ms"] / run[0]["total_ms"])[2]
    for row, name in zip(middle, ("`pwlib`, lattice", "pydensecrf2"), strict=True):
        times = f"{row['set_up_ms']:.0f} ms | {row['next_set_up_ms']:.0f} ms | {row['iteration_ms']:.2g} ms"
        end = f"{times} | {row['total_ms'] / 1000:.2f} s | {row['peak_mb']:.0f} MB |"
        for file, text in (("README.md", readme), ("benchmarks/crf/README.md", details)):
            if not any(line.startswith(f"| {name}") and line.endswith(end) for line in text.splitlines()):
                yield f"{file}: lacks the row | {name} | {end}"


# ------------------------------------------------------------------------------------------------------ notebooks


def notebooks() -> Iterator[str]:
    """Every stored notebook keeps the rules of notebook_rules.py and links to the next one."""
    for name, notebook in NOTEBOOKS.items():
        nbformat.validate(notebook)
        yield from notebook_rules.faults(notebook, name)
    for name, following in itertools.pairwise(NOTEBOOKS):
        if f"({following}.ipynb)" not in "\n".join(cell.source for cell in NOTEBOOKS[name].cells[-3:]):
            yield f"{name}: does not end with a link to {following}.ipynb"
    for path in sorted(LABS.glob("source/*/*.ipynb")):
        yield from notebook_rules.lab_faults(nbformat.read(path, 4), path.stem)


def budgets() -> Iterator[str]:
    """Every notebook has a time budget, and the whole series takes at most 15 minutes on two cores."""
    budget = json.loads((ROOT / "notebooks" / "budget.json").read_text("utf-8"))
    for name in sorted(set(NOTEBOOKS) ^ set(budget)):
        yield f"budget.json: {name} has no budget, or no notebook"
    total = sum(entry["cpu_minutes"] for entry in budget.values())
    if total > 15:
        yield f"budget.json: {total} minutes; expected at most 15"


def requirements() -> Iterator[str]:
    """The extra [notebooks] installs every package that a notebook imports."""
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["notebooks"]
    installed = {re.match(r"[\w-]+", entry)[0].lower().replace("-", "_") for entry in wanted}
    installed |= {"pwlib", "ipython", "pil"} | {name.lower() for name in sys.stdlib_module_names}
    for name, notebook in NOTEBOOKS.items():
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        for package in re.findall(r"^\s*(?:from|import) (\w+)", code, re.M):
            if package.lower() not in installed:
                yield f"{name}: imports {package}, which the extra [notebooks] does not install"


def exercises() -> Iterator[str]:
    """Each notebook prints the exercises that are registered, in order, with their titles, minutes and stars."""
    for name, notebook in NOTEBOOKS.items():
        printed, registered = notebook_rules.exercises(notebook), checks.exercises(name[:2])
        if list(printed) != sorted(registered) or len(printed) < 4:
            yield f"{name}: has the exercises {list(printed)}; registered are {sorted(registered)}, at least four"
            continue
        for exercise in printed.values():
            yield from (f"{name}: exercise {exercise.name} {fault}" for fault in exercise.faults(registered))


def main() -> int:
    configuration = (environment, makefile, workflows, requirements, budgets)
    rules = (*configuration, documents, sources, tables, results, notebooks, exercises)
    faults = [fault for rule in rules for fault in rule()]
    print("\n".join(faults) if faults else "Configuration, texts and stored notebooks agree.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
