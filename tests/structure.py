"""Count the lines of each part of pwlib and check which modules import which: `python tests/structure.py`.

Prints a table of lines against limits, then every broken rule, and exits with 1 if there is one. The rules: no part
exceeds its limit, the library imports neither `pwlib.cli` nor `pwlib.course`, and there is no import cycle. Imports
inside functions count.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pwlib"
# Lines of Python.
LIMITS = {"library": 3500, "lattice": 700, "data": 1050, "cli": 450, "annotations": 960, "tools": 1060, "course": None}
PARTS = ("data", "cli", "annotations", "tools", "course")  # sub-packages that do not count as library


def part(path: Path) -> str:
    """Return the part of pwlib that a file belongs to: library, or one of `PARTS`."""
    first = path.relative_to(PACKAGE).parts[0]
    if first == "__main__.py":
        return "cli"
    return first if first in PARTS else "library"


def is_lattice(path: Path) -> bool:
    return path.relative_to(PACKAGE).parts[0] == "lattice"


def count_lines() -> dict[str, int]:
    """Return the lines of Python in each part; those of the lattice are also counted as part of the library."""
    lines = dict.fromkeys(LIMITS, 0)
    for path in PACKAGE.rglob("*.py"):
        count = len(path.read_text("utf-8").splitlines())
        lines[part(path)] += count
        lines["lattice"] += count * is_lattice(path)
    return lines


def read_imports() -> dict[str, set[str]]:
    """Return {module: the modules of pwlib that it imports} for every module, from the source."""
    paths = {}  # "pwlib.data.__init__" and "pwlib.data.camvid": both are in the package pwlib.data
    for path in PACKAGE.rglob("*.py"):
        paths[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    modules = {name.removesuffix(".__init__") for name in paths}
    return {
        name.removesuffix(".__init__"): imported_by(path.read_text("utf-8"), name.rpartition(".")[0], modules)
        for name, path in paths.items()
    }


def imported_by(source: str, package: str, modules: set[str]) -> set[str]:
    """Return those of `modules` that a source file imports; `from a import b` means a.b where that is a module.

    Args:
        package: the package of the file, to which relative imports refer.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else base for name in names}
    return found & modules


def find_cycle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle in order, the first one again at the end; [] if there is none."""
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        for other in sorted(imports[module]) if module not in finished else ():
            if cycle := visit(other, [*trail, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(imports) if (cycle := visit(module, []))), [])


def wrong_directions(imports: dict[str, set[str]]) -> list[str]:
    """Return one sentence per import of `pwlib.cli` or `pwlib.course` by a module of the library."""
    above = re.compile(r"pwlib\.(cli|course|__main__)\b")
    return [
        f"{module} imports {other}; the library may not import the command line or the course"
        for module, others in sorted(imports.items())
        for other in sorted(others)
        if above.match(other) and not above.match(module)
    ]


def faults() -> list[str]:
    """Return every broken rule as a sentence."""
    imports, lines = read_imports(), count_lines()
    found = [f"{name} has {lines[name]} lines; expected at most {limit}" for name, limit in LIMITS.items()
             if limit is not None and lines[name] > limit]  # fmt: skip
    if cycle := find_cycle(imports):
        found.append(f"import cycle: {' -> '.join(cycle)}")
    return found + wrong_directions(imports)


def main() -> int:
    names = {"library": "library", "lattice": "  of which lattice"}
    print(f"{'part of pwlib':20}{'lines':>7}{'limit':>7}")
    for name, lines in count_lines().items():
        print(f"{names.get(name, name):20}{lines:7}{LIMITS[name] or '':>7}")
    found = faults()
    for fault in found:
        print(f"pwlib: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
