"""Steps of nbgrader for this course, in addition to its own; nbgrader_config.py lists where they run.

ForStudents     release: nothing but cells, with the metadata that nbgrader needs
Restore         grading: the cells that students may not change are as they were released
RunConfined     grading: the notebook runs in a kernel that confine.py confines, and ends in time
WithoutTests    feedback: without the code of hidden tests
keep_local      feedback and Formgrader: MathJax from its package, tasks by their names
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from time import monotonic

import mathjax
import nbformat
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.utils import ensure_async
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat.v4 import new_output
from nbgrader import utils
from nbgrader.preprocessors import ClearHiddenTests, Execute, NbGraderPreprocessor
from traitlets import Integer, Unicode

CONFINE = Path(__file__).with_name("confine.py")
PYTHON = Path(__file__).resolve().parents[3] / ".venv" / "bin" / "python"
TAG = re.compile(r"<(?=[a-zA-Z/!?])")
ATTACHED = re.compile(r"attachment:([^)\s\"'>]+)")

# What a kernel needs of the system: programs and libraries, time, fonts, names of users; the processors.
SYSTEM = """/usr /lib /lib32 /lib64 /bin /sbin /etc/ld.so.cache /etc/localtime /etc/fonts /etc/passwd /etc/nsswitch.conf
/etc/alternatives /proc/cpuinfo /proc/meminfo /proc/stat /proc/self /sys/devices/system/cpu /dev/urandom /dev/random
/dev/zero""".split()
BY_HAND = "LOOK AT THIS BY HAND: "  # course.py passes on what follows it in the log
KEPT = re.compile(r"PATH|LANG|LC_\w+|TZ|(OMP|MKL)_\w+|PWLIB_PROFILE|LAB_PROFILE")


class ForStudents(NbGraderPreprocessor):
    """Remove metadata, widget state, and attachments that no text shows: they can hold what cells no longer do.

    nbconvert's ClearMetadataPreprocessor leaves the metadata of text cells.
    """

    def preprocess(self, nb, resources):
        kept = {key: nb.metadata[key] for key in ("kernelspec", "language_info") if key in nb.metadata}
        nb.metadata = nbformat.from_dict(kept)
        for cell in nb.cells:
            kept = {key: cell.metadata[key] for key in ("nbgrader", "editable", "deletable") if key in cell.metadata}
            cell.metadata = nbformat.from_dict(kept)
            shown = set(ATTACHED.findall(cell.source))
            attachments = {name: data for name, data in cell.pop("attachments", {}).items() if name in shown}
            if attachments:
                cell.attachments = nbformat.from_dict(attachments)
        return nb, resources


class Restore(NbGraderPreprocessor):
    """Restore the locked and deleted cells of a submission, and remove metadata that the student added.

    nbgrader restores the source of changed cells itself. This step comes before it and handles what nbgrader does not
    expect: a test cell that is marked as worth no points, a cell tagged to be skipped, a solution deleted together with
    its test. HTML in the students' own text becomes plain text, because nbgrader's pages would run its scripts.
    """

    release = Unicode(help="the folder of the released labs").tag(config=True)

    def preprocess(self, nb, resources):
        name = resources["nbgrader"]["notebook"]
        released = nbformat.read(Path(self.release) / resources["nbgrader"]["assignment"] / f"{name}.ipynb", 4)
        known = {cell.metadata.nbgrader.grade_id: cell for cell in released.cells if "nbgrader" in cell.metadata}
        cells, found = [], {}
        for cell in nb.cells:
            grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
            original = known.get(grade_id) if grade_id not in found else None
            if original is None:
                cell.metadata = nbformat.from_dict({})
            else:
                cell = self.as_released(cell, original)
                found[grade_id] = cell
            cells.append(cell)
        before = None
        for grade_id, original in known.items():
            if grade_id not in found:
                self.log.warning("Cell %s was deleted; it is put back as released", grade_id)
                found[grade_id] = deepcopy(original)
                # Cells are told apart by identity: two may hold the same text.
                place = 0 if before is None else next(i for i, c in enumerate(cells) if c is before) + 1
                cells.insert(place, found[grade_id])
            before = found[grade_id]
        for cell in cells:
            if cell.cell_type != "code" and not utils.is_locked(cell):
                cell.source = TAG.sub("&lt;", cell.source)
        nb.cells, nb.metadata = cells, deepcopy(released.metadata)
        return nb, resources

    def as_released(self, cell, original):
        restored = deepcopy(original)
        if not utils.is_locked(original):
            restored.source = cell.source
            if original.cell_type == "markdown" and cell.get("attachments"):
                restored.attachments = cell.attachments
        return restored


class ConfinedKernelManager(AsyncKernelManager):
    """Starts the students' kernel in an empty folder of its own, confined unless LAB_UNSAFE is set.

    Files of that folder connect it, so that it needs no network. LAB_PYTHON names the Python that has pwlib, instead of
    .venv's.
    """

    def __init__(self, **options):
        # Short, as the sockets' paths must be; under no folder that other kernels may read.
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        super().__init__(transport="ipc", connection_file=str(self.folder / "kernel.json"), **options)
        self.autorestart = False

    def format_kernel_cmd(self, extra_arguments=None):
        python = os.environ.get("LAB_PYTHON", str(PYTHON))
        kernel = [python, "-m", "ipykernel_launcher", "-f", self.connection_file, *(extra_arguments or [])]
        if os.environ.get("LAB_UNSAFE"):
            return kernel
        look = "import sys; from importlib.util import find_spec; "
        look += "print(sys.prefix, sys.base_prefix, *find_spec('pwlib').submodule_search_locations, sep='\\n')"
        try:
            found = subprocess.run([python, "-E", "-c", look], capture_output=True, text=True, check=True, cwd=os.sep)
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{python} lacks pwlib; LAB_PYTHON names the Python that has it") from error
        read = [*SYSTEM, *found.stdout.splitlines()]
        options = [f"--read={path}" for path in read] + [f"--write={self.folder}", "--write=/dev/null"]
        # Signals do not reach a process in another namespace; a message makes the kernel interrupt itself.
        self.kernel_spec.interrupt_mode = "message"
        return [sys.executable, "-I", str(CONFINE), *options, "--", *kernel]

    async def start_kernel(self, **options):
        work, home = self.folder / "work", self.folder / "home"
        for folder in (work, home):
            folder.mkdir()
        if fonts := os.environ.get("LAB_MATPLOTLIB"):
            (home / "matplotlib").mkdir()
            for cached in Path(fonts).glob("fontlist-*.json"):
                shutil.copy(cached, home / "matplotlib")
        environment = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        for name in ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            environment[name] = str(home)
        environment |= {"MPLCONFIGDIR": str(home / "matplotlib"), "PYTHONDONTWRITEBYTECODE": "1"}
        with (self.folder / "kernel.log").open("w") as log:
            await super().start_kernel(**options | {"cwd": str(work), "env": environment, "stdout": log, "stderr": log})

    async def cleanup_resources(self, restart=False):
        await super().cleanup_resources(restart)
        if not restart:
            if said := last_words(self.folder / "kernel.log"):
                self.log.info("The kernel said: %s", said)
            shutil.rmtree(self.folder, ignore_errors=True)


def last_words(log: Path, most: int = 2000) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        return file.read().decode(errors="replace")


class RunConfined(Execute):
    """Run a submission with limits on a cell's seconds and output and on the notebook's seconds; always come to an end.

    A cell that was not run, or not to its end, gets an error, because nbgrader gives full points to a test cell without
    one. After the last cell one more cell is run that must fail. Where it does not, the student's code has changed how
    errors are reported, and a line is added to the log.
    """

    notebook_seconds = Integer(600, help="for all cells together").tag(config=True)
    cell_bytes = Integer(1_000_000, help="of output that a cell may have").tag(config=True)

    def __init__(self, **options):
        super().__init__(**{"kernel_manager_class": ConfinedKernelManager, **options})
        self.shutdown_kernel = "immediate"
        self.startup_timeout = 180
        self.iopub_timeout = 15  # that a kernel has to come to rest once it is interrupted
        self.store_widget_state = False
        self.timeout_func = lambda cell: max(1, min(self.timeout, int(self.deadline - monotonic())))

    def preprocess(self, nb, resources, km=None):
        self.ended, self.last = None, len(nb.cells) - 1
        return super().preprocess(nb, resources, km)

    def preprocess_cell(self, cell, resources, index):
        if index == 0:
            self.deadline = monotonic() + self.notebook_seconds
        if cell.cell_type == "code" and cell.source.strip():
            self.run(cell, index)
        if index == self.last and not self.ended and not self.errors_are_reported():
            self.log.error(f"{BY_HAND}an error raised after the last cell was not reported as one")
        return cell, resources

    def run(self, cell, index):
        if not self.ended and monotonic() > self.deadline:
            self.ended = f"the notebook has used its {self.notebook_seconds} seconds"
        if self.ended:
            cell.outputs = [failure("NotRun", f"This cell was not run: {self.ended}.")]
            return
        self.received, cell_number = 0, cell.metadata.get("nbgrader", {}).get("grade_id", f"number {index + 1}")
        try:
            self.execute_cell(cell, index, store_history=True)
        except DeadKernelError:
            self.ended = (
                f"the kernel ended in cell {cell_number}, for example because of os._exit, quit or too much memory"
            )
        except CellTimeoutError:
            self.ended = f"cell {cell_number} took too long and could not be interrupted"
        if self.ended:
            cell.outputs = [*cell.outputs, failure("DidNotEnd", f"This cell did not end: {self.ended}.")]
            if utils.is_locked(cell) and not utils.is_grade(cell):
                self.log.error(f"{BY_HAND}a cell that students cannot change did not end; was the machine too busy?")
        if utils.is_grade(cell):
            # nbgrader takes all points for a word on stderr; a warning or a progress bar is no wrong answer.
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.name = "stdout"

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("status", "execute_input"):
            return super().process_message(msg, cell, cell_index)
        before = self.received
        self.received += (
            100 + len(json.dumps(msg["content"], default=str)) + sum(len(b) for b in msg.get("buffers", ()))
        )
        if self.received <= self.cell_bytes:
            return super().process_message(msg, cell, cell_index)
        if before <= self.cell_bytes:
            sentence = f"This cell printed more than {self.cell_bytes:,} bytes; it was stopped there."
            cell.outputs.append(failure("TooMuchOutput", sentence))
            self.interruption = asyncio.ensure_future(ensure_async(self.km.interrupt_kernel()))
        return None

    def errors_are_reported(self):
        word = secrets.token_hex(8)
        probe = nbformat.v4.new_code_cell(f"raise AssertionError({word!r})")
        try:
            self.nb.cells.append(probe)
            self.received = 0
            self.execute_cell(probe, len(self.nb.cells) - 1, store_history=False)
        except (DeadKernelError, CellTimeoutError):
            return False
        finally:
            self.nb.cells.pop()
        return any(o.output_type == "error" and (o.ename, o.evalue) == ("AssertionError", word) for o in probe.outputs)


def failure(name: str, sentence: str):
    return new_output("error", ename=name, evalue=sentence, traceback=[f"{name}: {sentence}"])


class WithoutTests(ClearHiddenTests):
    """Show the message of a hidden test without its code, because students pass feedback on."""

    def preprocess_cell(self, cell, resources, index):
        before = cell.source
        cell, resources = super().preprocess_cell(cell, resources, index)
        if cell.source != before:
            cell.source = f"{cell.source.rstrip()}\n# Hidden tests ran here."
            for output in cell.outputs:
                if output.output_type == "error":
                    # A traceback quotes the lines around the one that failed.
                    output.traceback = [f"{output.ename}: {output.evalue}"]
        return cell, resources


MATHJAX = """<script>
MathJax = {tex: {inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]], processEscapes: true}, options: {enableMenu: false}};
</script>
<script>%s</script>
<script>
// Formgrader's script waits for MathJax 2.
MathJax.Hub = {Startup: {signal: {Interest: (tell) => MathJax.startup.promise.then(() => tell("End"))}}};
</script>"""
REMOTE = re.compile(
    r'<script src="https?://[^"]*mathjax[^"]*">\s*</script>.*?<!-- End of mathjax configuration -->', re.S | re.I
)
STYLE = "td, th {padding: 0.15em 0.6em} .output_error pre {white-space: pre-wrap}"
HEADING = re.compile(r"^#+ +(.*?)(?: *\([^()]*points?\))?$", re.M)


def keep_local(exporter: type) -> None:
    """Make nbconvert's pages of notebooks contain MathJax instead of asking another host, and name the tasks.

    nbgrader's templates for feedback and Formgrader write the address themselves, so the page is changed afterwards.
    """
    convert = exporter.from_notebook_node

    def from_notebook_node(self, nb, resources=None, **options):
        page, resources = convert(self, nb, resources, **options)
        script = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5" / "tex-svg.js"
        local = MATHJAX % script.read_text("utf-8").replace("</script", "<\\/script")
        page = REMOTE.sub(lambda _: local, page, count=1)
        page = page.replace("</head>", f"<style>{STYLE}</style></head>", 1)
        for grade_id, task in task_names(nb).items():
            comment = f'<a href="#comment-{grade_id}">Comment'
            page = page.replace(f"{comment}</a>", f"{comment} on {task}</a>")
            for label in ("Test cell", "Written response"):
                page = page.replace(f'<a href="#{grade_id}">{label}</a>', f'<a href="#{grade_id}">{task}</a>')
            if grade_id.startswith("test_"):  # a text may contain the name of an answer
                for label in (f"Grade cell: <code>{grade_id}</code>", f"<code>{grade_id}</code>"):
                    page = page.replace(label, f"Tests of {task}")
        return page, resources

    exporter.from_notebook_node = from_notebook_node


def task_names(nb) -> dict[str, str]:
    """By grade_id of a test or an answer: the heading above it, and the part if the heading has several."""
    found, heading = {"test": {}, "answer": {}}, ""
    for cell in nb.cells:
        marks = cell.metadata.get("nbgrader", {})
        answer = marks.get("solution", False)
        if cell.cell_type == "markdown" and not answer and (headings := HEADING.findall(cell.source)):
            heading = headings[-1]
        if answer or marks.get("grade"):
            found["answer" if answer else "test"][marks["grade_id"]] = heading
    names = {}
    for headings in found.values():
        for grade_id, task in headings.items():
            parts = [other for other in headings if headings[other] == task]
            part = f", part {parts.index(grade_id) + 1}" if len(parts) > 1 else ""
            names[grade_id] = html.escape(task + part)
    return names
