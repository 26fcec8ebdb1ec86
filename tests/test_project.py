"""The files around the library agree with one another: environment.yml, pyproject.toml, the Makefile, the workflows."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.M))


def extras(requirement: str) -> set[str]:
    """{"notebooks", "test"} of .[notebooks,test]"""
    found = re.search(r"\.\[([\w,\s-]+)\]", requirement)
    return {name.strip() for name in found[1].split(",")} if found else set()


def test_conda_environment_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    assert environment["name"] == PROJECT["name"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert [re.match(r"\w+", entry)[0] for entry in conda] == ["python", "pip"], "the rest comes from pyproject.toml"
    (python,) = (entry for entry in conda if entry.startswith("python"))
    assert PROJECT["requires-python"] in python
    assert pip == ["-e .[notebooks]"]
    assert extras(pip[0]) <= set(PROJECT["optional-dependencies"])


def test_notebooks_extra_holds_what_notebooks_import():
    """Whatever a notebook imports from outside comes with the extra `notebooks`."""
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["notebooks"]
    installed = {re.match(r"[\w-]+", entry)[0].lower().replace("-", "_") for entry in wanted}
    installed |= {"pwlib", "ipython", "pil"} | {name.lower() for name in sys.stdlib_module_names}
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        for name in re.findall(r"^\s*(?:from|import) (\w+)", code, re.M):
            assert name.lower() in installed, f"{path.name} imports {name}"


def test_every_make_target_is_phony_and_explained():
    phony = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    assert phony == TARGETS
    assert set(re.findall(r"^([a-z][\w-]*):.*## \w", MAKEFILE, re.M)) == TARGETS
    for name in extras(re.search(r"--editable '(\.\[[^']*)'", MAKEFILE)[1]):
        assert name in PROJECT["optional-dependencies"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=[p.stem for p in WORKFLOWS])
def test_workflow_names_what_exists(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["name"] and workflow[True], "YAML 1.1 reads the key `on` as true"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            command = step.get("run", "")
            for target in re.findall(r"\bmake ([\w-]+)", command):
                assert target in TARGETS, f"make {target}"
            assert extras(command) <= set(PROJECT["optional-dependencies"]), command


def test_workflows_cover_systems_pythons_and_torches():
    cpu = yaml.safe_load((ROOT / ".github" / "workflows" / "cpu.yml").read_text("utf-8"))
    matrix = cpu["jobs"]["library"]["strategy"]["matrix"]
    assert len(matrix["os"]) == 3 and len(matrix["python"]) == 2 and matrix["torch"] == ["oldest", "newest"]
    assert f">={matrix['python'][0]}" == PROJECT["requires-python"], "the oldest Python is the oldest that is tested"
    commands = " ".join(step.get("run", "") for step in cpu["jobs"]["library"]["steps"])
    for package in ("torch", "torchvision"):
        (lowest,) = (entry for entry in PROJECT["dependencies"] if re.match(rf"{package}\W", entry))
        assert f"{package}=={lowest.partition('>=')[2]}.*" in commands, f"the oldest {package} is not the one tested"
    gpu = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text("utf-8"))
    assert "self-hosted" in gpu["jobs"]["cuda"]["runs-on"]


def test_continuous_integration_runs_make_test():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text("utf-8"), re.M)
