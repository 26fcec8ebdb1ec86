"""A copy of the course to release and grade in, and the browser of tests/browser."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import students
from cycle import graded  # noqa: F401 (a fixture, here and once, so that a lab is graded once)

spec = importlib.util.spec_from_file_location("browser_fixtures", students.ROOT / "tests" / "browser" / "conftest.py")
try:
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    browser, open_page = fixtures.browser, fixtures.open_page
except pytest.skip.Exception:  # no playwright
    pass


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    missing = not students.NBGRADER.exists()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.classroom)
            if missing:
                item.add_marker(pytest.mark.skip("there is no .venv-classroom: make classroom makes it"))


@pytest.fixture
def course(tmp_path) -> Path:
    """An empty course: its machinery, no labs."""
    return students.make_course(tmp_path / "course", [])
