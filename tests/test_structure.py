"""The public names of pwlib, and the rules on size and imports that `tests/structure.py` checks."""

import subprocess
import sys

import pwlib
from tests import structure


def test_public_names():
    assert sorted(pwlib.__all__) == [
        "ContextualCRF",
        "DeepLabLargeFOV",
        "DenseCRF",
        "FeatMapNet",
        "Kernel",
        "PiecewiseTrainedModel",
        "PiecewiseTrainer",
        "Trace",
        "VOID",
        "dense_crf",
        "load",
        "load_run",
        "probabilities_from_labels",
    ]
    for name in pwlib.__all__:
        item = getattr(pwlib, name)
        if callable(item):  # a constant has no docstring of its own; a dataclass gets its signature as one
            assert item.__doc__ and not item.__doc__.startswith(f"{name}("), f"{name} has no docstring"


def test_importing_the_library_leaves_out_what_takes_long_to_import():
    """torchvision takes as long as torch, numba and matplotlib about a second; scores and CRFs need none of them."""
    code = "import sys, pwlib; print([name for name in ('torchvision', 'numba', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_there_is_no_import_cycle_and_the_library_imports_neither_cli_nor_course():
    imports = structure.read_imports()
    assert "pwlib.data.scenes" in imports["pwlib.data"]
    assert "pwlib.crf" in imports["pwlib.model"]
    assert not structure.find_cycle(imports)
    assert not structure.wrong_directions(imports)


def test_imports_in_functions_and_of_submodules_are_found():
    source = """
import torch
import pwlib.a
from pwlib import b, name
from pwlib.c import d
from . import near
from .near import name
from ..f import name
def later():
    from pwlib.e import name
"""
    wanted = {"pwlib", "pwlib.a", "pwlib.b", "pwlib.c.d", "pwlib.g.near", "pwlib.f", "pwlib.e"}
    modules = wanted | {"pwlib.c", "pwlib.g", "pwlib.other"}
    assert structure.imported_by(source, "pwlib.g", modules) == wanted


def test_a_cycle_and_a_wrong_direction_are_found():
    imports = {"pwlib.a": {"pwlib.b"}, "pwlib.b": {"pwlib.c"}, "pwlib.c": set(), "pwlib.cli.d": {"pwlib.a"}}
    assert not structure.find_cycle(imports) and not structure.wrong_directions(imports)
    imports["pwlib.c"] = {"pwlib.a"}
    assert structure.find_cycle(imports) == ["pwlib.a", "pwlib.b", "pwlib.c", "pwlib.a"]
    imports["pwlib.c"] = {"pwlib.cli.d"}
    assert len(structure.wrong_directions(imports)) == 1
