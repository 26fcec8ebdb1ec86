"""Fixtures for all tests: CamVid where it is available, notebooks, and functions defined in notebooks."""

import ast
import math
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_fixtures import finished, photographs, pictures  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """The folder that holds camvid/, from the environment variable PWLIB_DATA; skips the test if there is none."""
    root = os.environ.get("PWLIB_DATA")
    if not root:
        pytest.skip("PWLIB_DATA is not set: it names the folder that holds camvid/")
    if not (Path(root) / "camvid").is_dir():
        pytest.skip(f"PWLIB_DATA is {root}, which holds no camvid/")
    return Path(root)


@pytest.fixture(scope="session")
def notebook() -> Callable[[str], nbformat.NotebookNode]:
    """notebook("02") reads the stored notebook whose name starts with 02."""

    def load(name: str) -> nbformat.NotebookNode:
        (path,) = NOTEBOOKS.glob(f"{name}*.ipynb")
        return nbformat.read(path, as_version=4)

    return load


@pytest.fixture(scope="session")
def pull(notebook) -> Callable:
    """pull("02", "mean_field") returns the function that the notebook defines in a cell tagged `from-scratch`.

    Only the definitions in from-scratch cells, the imports, and constants such as `VOID = 255` are run.
    """
    given = {"torch": torch, "F": F, "nn": torch.nn, "np": np, "math": math}
    loaded: dict[str, dict] = {}

    def find(name: str, function: str) -> Callable:
        if name not in loaded:
            namespace = dict(given)
            for cell in notebook(name).cells:
                tags = cell.metadata.get("tags", [])
                if cell.cell_type == "code" and "nbval-skip" not in tags and "exercise" not in tags:
                    run_definitions(cell.source, namespace, functions="from-scratch" in tags)
            loaded[name] = namespace
        if function not in loaded[name]:
            raise LookupError(f"notebook {name} has no cell tagged from-scratch that defines {function}")
        return loaded[name][function]

    return find


def run_definitions(source: str, namespace: dict, *, functions: bool) -> None:
    """Run only the imports and literal constants of a cell and, if `functions` is set, its functions and classes."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    kept = []
    for node in ast.parse("\n".join(lines)).body:
        # Plain names only: `table[0] = 1` changes a value that exists only when the whole notebook runs.
        named = isinstance(node, ast.Assign) and not any(
            isinstance(t, ast.Subscript | ast.Attribute) for t in node.targets
        )
        constant = named and _literal(node.value)
        definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if isinstance(node, ast.Import | ast.ImportFrom) or constant or (functions and definition):
            kept.append(node)
    exec(compile(ast.Module(kept, type_ignores=[]), "<notebook>", "exec"), namespace)


def _literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


@pytest.fixture
def one_thread():
    """The rounding of sums depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
