"""A browser, a JupyterLab and an executed notebook for the browser tests; no request leaves this machine.

The browser is a Chromium or Chrome that is there, or that apt can install where we are root. Without one the tests skip
and say so; under CI=true they fail.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api")

FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --no-default-browser-check "
    "--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"

# The trace that all tests look at: small, with every number different from every other.
MAKE_TRACE = """
import torch
from pwlib.crf import DenseCRF

def make_trace(compatibility="potts", height=24, width=32, classes=4, iterations=6):
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x > 0.5) * 0.6 + 0.2]) + 0.05 * torch.rand(3, height, width, generator=generator)
    truth = (2 * (y > 0.5) + (x > 0.5)).long() % classes
    logits = 1.5 * torch.nn.functional.one_hot(truth, classes).permute(2, 0, 1)
    logits = logits + torch.randn(classes, height, width, generator=generator)
    crf = DenseCRF(classes, theta_alpha=6, theta_beta=40, theta_gamma=1.5, w_bilateral=3, w_spatial=2,
                   compatibility=compatibility)
    return crf.trace(logits, image.clamp(0, 1), iterations=iterations)
"""
LARGE = """
import torch
from pwlib.crf import DenseCRF

def large_problem(w_bilateral=2):
    generator = torch.Generator().manual_seed(0)
    image, logits = torch.rand(3, 90, 80, generator=generator), 2 * torch.randn(3, 90, 80, generator=generator)
    options = {"theta_alpha": 10, "theta_beta": 40, "theta_gamma": 2, "w_spatial": 1, "iterations": 2}
    return image.half().float(), logits.half().float(), DenseCRF(3, **options, w_bilateral=w_bilateral)
"""
NOTEBOOK = [
    MAKE_TRACE,
    "from pwlib.course.explorer import explore\n"
    'explorer = explore(make_trace(), class_names=["sky", "sea", "land", "tree"], iteration=2, label=1)\nexplorer',
    "print(explorer.iteration, explorer.label, explorer.pixel, explorer.senders)",
    "explorer.iteration, explorer.pixel = 4, (3, 5)",
]


def find_browser() -> str | None:
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    return found or (MAC if Path(MAC).exists() else None)


@pytest.fixture(scope="session")
def browser() -> Iterator[sync_api.Browser]:
    path = find_browser()
    if path is None and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run("apt-get update -q && apt-get install -y -q chromium", shell=True, capture_output=True)
        path = find_browser()
    if path is None:
        reason = "no Chromium or Chrome found (tried: " + ", ".join(NAMES) + ")"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[[str], sync_api.Page]]:
    """open_page(url) -> Page; after the test: no request went to another host, and nothing was thrown in the page."""
    contexts, requests, errors = [], [], []

    def open_page(url: str, *, width: int = 940, height: int = 1100, **options) -> sync_api.Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    away = [u for u in requests if urlsplit(u).scheme not in {"file", "data", "blob"}]
    away = [u for u in away if urlsplit(u).hostname not in {"127.0.0.1", "localhost"}]
    assert not away, f"requests to other hosts: {away}"
    assert not errors, f"errors in the page: {errors}"


@pytest.fixture
def still(open_page, tmp_path):
    """still(explorer or trace) -> a page with its explorer, no kernel behind it, drawn."""

    from pages import PAGE, drawn

    from pwlib.course.explorer import embed_html

    def show(source, *, style="", width=940, height=1100, media=None, **options):
        path = tmp_path / "page.html"
        path.write_text(PAGE.format(style=style, html=embed_html(source, **options)), encoding="utf-8")
        page = open_page(path.as_uri(), width=width, height=height, **(media or {}))
        drawn(page)
        return page

    return show


@pytest.fixture(scope="session")
def make_trace() -> Callable:
    namespace: dict = {}
    exec(MAKE_TRACE, namespace)
    return namespace["make_trace"]


LARGE_NOTEBOOK = [
    LARGE,
    "from pwlib.course.explorer import explore\nexplore(*large_problem(), iteration=2, label=1, pixel=(5, 7))",
]


def write_notebook(path: Path, sources: list[str]) -> Path:
    cells = [nbformat.v4.new_code_cell(source.strip(), id=f"cell-{n}") for n, source in enumerate(sources)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="session")
def large_problem() -> Callable:
    namespace: dict = {}
    exec(LARGE, namespace)
    return namespace["large_problem"]


@pytest.fixture(scope="session")
def notebook_path(tmp_path_factory) -> Path:
    """A notebook with an explorer, not yet run; beside it one with an image too large for the browser."""
    folder = tmp_path_factory.mktemp("notebooks")
    write_notebook(folder / "large.ipynb", LARGE_NOTEBOOK)
    return write_notebook(folder / "explorer.ipynb", NOTEBOOK)


def jupyter_environment(folder: Path) -> dict[str, str]:
    """The user's own Jupyter settings stay out of the tests."""
    folders = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    return {**os.environ, **folders, "IPYTHONDIR": str(folder / "ipython"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


@pytest.fixture(scope="session")
def executed(notebook_path, tmp_path_factory) -> nbformat.NotebookNode:
    """The same notebook as nbconvert executes and stores it."""
    target = tmp_path_factory.mktemp("executed") / "executed.ipynb"
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(notebook_path)]
    environment = jupyter_environment(tmp_path_factory.mktemp("jupyter"))
    subprocess.run([*command, "--output", str(target)], check=True, env=environment, capture_output=True)
    return nbformat.read(target, as_version=4)


def write_settings(folder: Path, files: dict[str, dict]) -> None:
    for name, settings in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def lab(notebook_path, tmp_path_factory) -> Iterator[Callable[[str], str]]:
    """lab("explorer.ipynb"): the address of a file in a running JupyterLab."""
    pytest.importorskip("jupyterlab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, folder = secrets.token_hex(16), tmp_path_factory.mktemp("jupyter")
    server_settings = {"ip": "127.0.0.1", "port": port, "open_browser": False, "allow_root": True}
    server_settings |= {"root_dir": str(notebook_path.parent)}
    lab_settings = {"news_url": None, "extension_manager": "readonly"}
    write_settings(
        folder / "config",
        {
            "jupyter_server_config.json": {"ServerApp": server_settings, "IdentityProvider": {"token": token}},
            "jupyter_lab_config.json": {"LabApp": lab_settings},
            "lab/user-settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
                "fetchNews": "false",
                "checkForUpdates": False,
            },
        },
    )
    log = (folder / "log").open("w")
    environment = jupyter_environment(folder)
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab"], env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2).close()
                break
            except OSError:
                if server.poll() is not None:
                    break
                time.sleep(0.25)
        else:
            pytest.fail("JupyterLab did not start within a minute:\n" + (folder / "log").read_text()[-2000:])
        if server.poll() is not None:
            pytest.fail("JupyterLab ended:\n" + (folder / "log").read_text()[-2000:])
        yield lambda name: f"{address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()
