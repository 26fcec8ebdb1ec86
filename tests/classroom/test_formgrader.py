"""Formgrader in a browser: the instructor reads a submission and grades the written answer."""

import os
import re
import secrets
import socket
import subprocess
import time
import urllib.request

import pytest
from nbformat.v4 import new_markdown_cell
from students import NBGRADER, call, put
from test_release import clean, install, small_lab
from test_term import RIGHT, TASK, table

pytestmark = pytest.mark.browser
WRITTEN = "Because $x + x$ needs no product. <img src=x onerror='window.taken = 1'><script>window.taken = 1</script>"


@pytest.fixture
def formgrader(course, tmp_path):
    """formgrader("gradebook"): the address of a page in a running server; ada's lab9 is graded, but for her text."""
    lab, submission = small_lab(), clean()
    submission.cells[1].source, submission.cells[3].source = RIGHT, WRITTEN
    for notebook in (lab, submission):
        notebook.cells.insert(1, new_markdown_cell(TASK))
    install(course, lab)
    assert call(course, "release").returncode == 0
    put(submission, tmp_path / "handed_in", "ada", "lab9")
    done = call(course, "grade", str(tmp_path / "handed_in"))
    assert "ada lab9: 4 of 5 points (the written answer is not graded yet)" in done.stdout, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    path = os.pathsep.join([str(NBGRADER.parent), os.environ["PATH"]])
    token = secrets.token_hex(16)
    options = [f"--ServerApp.port={port}", "--ServerApp.allow_root=True", "--ServerApp.open_browser=False"]
    options.append(f"--IdentityProvider.token={token}")
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [NBGRADER, "-m", "jupyterlab", *options],
            cwd=course,
            env={**os.environ, **folders, "PATH": path},
            stdout=log,
            stderr=log,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2).close()
                break
            except OSError:
                time.sleep(0.25)
        yield lambda page: f"{address}/formgrader/{page}?token={token}"
    finally:
        server.terminate()
        server.wait(20)


def test_a_written_answer_is_graded_by_hand(formgrader, course, open_page):
    page = open_page(formgrader("gradebook"), width=1280, height=900)
    page.get_by_role("link", name="lab9").click()
    page.get_by_role("link", name="lab9").click()
    page.get_by_role("link", name="Submission #1").click()
    page.wait_for_function("document.querySelectorAll('mjx-container, .MathJax').length >= 2")
    text = page.locator("body").inner_text()
    assert "Tests of Task 1 · Doubling" in text and "return number + number" in re.sub(r"\s+", " ", text)
    assert page.evaluate("window.taken") is None
    score = page.locator("input.score").last
    score.fill("1")
    score.press("Tab")
    page.wait_for_selector(".score-saved:visible")
    page.wait_for_load_state("networkidle")
    assert call(course, "export").returncode == 0
    assert table(course / "grades-moodle.csv") == [["username", "lab9"], ["ada", "5"]]
