"""A planted leak is found, wherever it is; what should not be released or graded is not, and one sentence says why."""

import base64
import importlib.util
import os
import shutil
import socket
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from students import COURSE, NBGRADER, call, put

spec = importlib.util.spec_from_file_location("leaks", COURSE / "grading" / "leaks.py")
checker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checker)

ANSWER = "### BEGIN SOLUTION\n    doubled = number + number\n    return doubled\n    ### END SOLUTION"
TEST = "assert double(2) == 4\n### BEGIN HIDDEN TESTS\nassert double(-3.5) == -7.0\n### END HIDDEN TESTS"


def marked(cell, grade_id, **marks):
    cell.metadata["nbgrader"] = {
        "grade_id": grade_id, "grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3,
        **marks,
    }  # fmt: skip
    return cell


def small_lab():
    cells = [
        new_markdown_cell("# A lab\n\nDouble a number."),
        marked(new_code_cell(f"def double(number):\n    {ANSWER}"), "double", solution=True),
        marked(new_code_cell(TEST), "test_double", grade=True, locked=True, points=4),
        marked(new_markdown_cell("Because adding is cheap."), "why", grade=True, solution=True, points=1),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def clean():
    """What students should get of `small_lab`, written by hand."""
    released = small_lab()
    released.cells[1].source = "def double(number):\n    # YOUR CODE HERE\n    raise NotImplementedError"
    released.cells[2].source = "assert double(2) == 4\n"
    released.cells[3].source = "*Your answer here.*"
    return released


def install(course, notebook):
    (course / "source" / "lab9").mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, course / "source" / "lab9" / "lab9.ipynb")


def in_text(notebook):
    notebook.cells[0].source += "\n\n```python\ndoubled = number + number\n```"


def in_code(notebook):
    notebook.cells.insert(1, new_code_cell("doubled = number  +  number"))


def as_a_whole(notebook):
    # Each line is also seen elsewhere in the source, so only the whole gives it away.
    notebook.cells[0].source += "\n\ndoubled = number + number return doubled"


def in_an_output(notebook):
    notebook.cells[2].outputs.append(new_output("stream", text="AssertionError: assert double(-3.5) == -7.0"))


def in_metadata(notebook):
    notebook.metadata["history"] = ["assert double(-3.5) == -7.0"]


def in_a_cells_metadata(notebook):
    notebook.cells[1].metadata["original"] = "    doubled = number + number"


def in_an_attachment(notebook):
    answer = base64.b64encode(b"Because adding is cheap.").decode()
    notebook.cells[0].source += "\n[more](attachment:more.txt)"
    notebook.cells[0]["attachments"] = {"more.txt": {"text/plain": answer}}


def in_a_widget(notebook):
    state = {"state": {"1": {"state": {"value": "doubled = number + number"}}}}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}


def in_a_tag(notebook):
    notebook.cells[1].metadata["tags"] = ["solution: doubled = number + number"]


def the_written_answer(notebook):
    notebook.cells[3].source = "Because  adding is\ncheap."


def the_mark(notebook):
    notebook.cells[2].source += "### BEGIN HIDDEN TESTS"


LEAKS = [in_text, in_code, in_an_output, in_metadata, in_a_cells_metadata, in_an_attachment, in_a_widget, in_a_tag,
         the_written_answer, the_mark]  # fmt: skip


@pytest.mark.parametrize("plant", LEAKS)
def test_a_leak_planted_in_a_release_is_found(plant):
    released = clean()
    assert not checker.leaks(small_lab(), released)
    plant(released)
    assert checker.leaks(small_lab(), released)


def test_an_answer_whose_lines_are_all_seen_is_found_as_a_whole():
    source, released = small_lab(), clean()
    for notebook in (source, released):
        notebook.cells[0].source += "\n\n    doubled = number + number\n\nand\n\n    return doubled"
    assert not checker.leaks(source, released)
    as_a_whole(released)
    assert checker.leaks(source, released)


def test_release_refuses_what_would_leak_and_strips_what_it_can(course):
    source = small_lab()
    for plant in (in_an_output, in_metadata, in_a_cells_metadata, in_a_widget, in_a_tag):
        plant(source)
    install(course, source)
    done = call(course, "release")
    assert done.returncode == 0, done.stderr
    released = nbformat.read(course / "release" / "lab9" / "lab9.ipynb", 4)
    assert not checker.leaks(small_lab(), released)
    assert [cell.source.rstrip() for cell in released.cells] == [cell.source.rstrip() for cell in clean().cells]
    as_a_whole(source)
    install(course, source)
    done = call(course, "release")
    assert done.returncode and "would give its answers away" in done.stderr and "what double hides" in done.stderr
    assert not (course / "release" / "lab9").exists()


def test_grading_says_in_a_sentence_what_it_cannot_do(course, tmp_path):
    """A link, a folder with an odd name, a file that is no notebook, code that cheats: named, the others graded."""
    done = call(course, "grade", str(tmp_path / "nowhere"))
    assert done.returncode and "expected the folder that holds one folder for each student" in done.stderr
    source = small_lab()
    install(course, source)
    assert call(course, "release").returncode == 0
    handed_in = tmp_path / "handed_in"
    # The errors of tests are swallowed, and the kernel ends by itself: one looks right, one has no answer at all.
    swallow = """
shell = get_ipython()
execute = shell.kernel.do_execute

async def all_is_well(*arguments, **options):
    return {**await execute(*arguments, **options), "status": "ok", "payload": [], "user_expressions": {}}

shell.kernel.do_execute, shell.showtraceback = all_is_well, lambda *_, **__: None
"""
    for student, code in (("swallows", swallow), ("quits", "import os\nos._exit(0)"), ("1234", "pass")):
        submission = clean()
        submission.cells[1].source = (
            "def double(number):\n    return 2 * number" if student == "1234" else "double = None"
        )
        submission.cells.insert(1, new_code_cell(code))
        put(submission, handed_in, student, "lab9")
    (handed_in / "link").mkdir()
    os.symlink(course / "source" / "lab9" / "lab9.ipynb", handed_in / "link" / "lab9.ipynb")
    os.symlink(course / "source" / "lab9", handed_in / "folder")
    (handed_in / "torn").mkdir()
    (handed_in / "torn" / "lab9.ipynb").write_text('{"cells": [')
    (handed_in / "odd; name").mkdir()
    done = call(course, "grade", str(handed_in), CELL_SECONDS="20")
    said = {line.split(" lab9: ")[0]: line for line in done.stdout.splitlines() if " lab9: " in line}
    assert "is a symbolic link" in said["link"] and "is a symbolic link" in said["folder"]
    assert "NOT GRADED" in said["torn"]
    assert "odd; name" in done.stdout and "is not that of a student" in done.stdout
    assert said["1234"].startswith("1234 lab9: 4 of 5")
    assert said["quits"].startswith("quits lab9: 0 of 5")
    assert said["swallows"].startswith("swallows lab9: 4 of 5"), (
        "this cheat works, as INSTRUCTOR.md says; it is noticed"
    )
    assert "look by hand" in said["swallows"] and "look by hand" not in said["1234"]
    assert done.returncode and "4 of 7 could not be graded" in done.stderr


def test_where_the_machine_cannot_confine_nothing_is_graded(course, tmp_path):
    install(course, small_lab())
    (tmp_path / "handed_in").mkdir()
    confine = course / "grading" / "confine.py"
    text = confine.read_text()
    # A kernel without Landlock says so by an error, which this number makes it do.
    confine.write_text(text.replace('"landlock_create_ruleset", 444, None', '"landlock_create_ruleset", 9999, None'))
    assert confine.read_text() != text
    done = call(course, "grade", str(tmp_path / "handed_in"), LAB_BUBBLEWRAP="0")
    assert done.returncode and "Nothing was graded: bubblewrap does not run, and this kernel" in done.stderr
    assert "Install bubblewrap" in done.stderr and "UNSAFE=1" in done.stderr
    done = call(course, "grade", str(tmp_path / "handed_in"), "--unsafe")
    assert "can read and change whatever you can" in done.stderr and "contains no submission" in done.stderr


def test_a_kernel_that_only_claims_to_confine_is_found_out(tmp_path):
    """The same command without Landlock's call: confine.py looks whether it is true before it goes on."""
    text = (COURSE / "grading" / "confine.py").read_text()
    claims = tmp_path / "confine.py"
    claims.write_text(text.replace("    confine_files(read, write)\n", ""))
    assert claims.read_text() != text
    environment = {**os.environ, "LAB_BUBBLEWRAP": "0"}
    command = [NBGRADER, claims, "--", sys.executable, "-c", "print(1)"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode and not done.stdout and "can still read" in done.stderr


SYSTEM = [f"--read={path}" for path in ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.prefix)]
OUTSIDE = """
import os, signal, socket
print("exists" if os.path.exists(PATH) else "hidden")
address = ("127.0.0.1", PORT)
signal.signal(10, lambda *_: print("own signal"))
os.kill(os.getpid(), 10)
open("mine", "w").write("mine")
for name, attempt in {
    "read": lambda: open(PATH).read(),
    "write": lambda: open(PATH, "w"),
    "own": lambda: os.chown(PATH, -1, -1),
    "extend": lambda: os.setxattr(PATH, "user.mark", b"1"),
    "send": lambda: socket.create_connection(address, 2),
    "kill": lambda: os.kill(PID, 0),
}.items():
    try:
        attempt()
        print("could", name)
    except OSError as error:
        print("could not", name)
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"1", address)
except OSError:
    pass
"""


@pytest.mark.parametrize("isolation", ["bubblewrap", "the fallback", "nothing"])
def test_a_confined_program_reaches_nothing_outside(isolation, tmp_path):
    if isolation == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    secret, work = tmp_path / "secret", tmp_path / "work"
    secret.write_text("secret")
    work.mkdir()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        datagrams.bind(server.getsockname())
        datagrams.settimeout(0.5)
        names = f"PATH, PORT, PID = {str(secret)!r}, {server.getsockname()[1]}, {os.getpid()}\n"
        command = [sys.executable, "-I", "-c", names + OUTSIDE]
        if isolation != "nothing":
            command = [NBGRADER, "-I", COURSE / "grading" / "confine.py", *SYSTEM, f"--write={work}", "--", *command]
        environment = {**os.environ, "LAB_BUBBLEWRAP": "1" if isolation == "bubblewrap" else "0"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=environment)
        try:
            received = datagrams.recv(1)
        except TimeoutError:
            received = None
    assert received == (b"1" if isolation == "nothing" else None)
    said = done.stdout.splitlines()
    # The fallback cannot hide that a file exists, so this shows which of the two was used.
    assert said[:2] == ["hidden" if isolation == "bubblewrap" else "exists", "own signal"], done.stderr
    assert [line.startswith("could not") for line in said[2:]] == [isolation != "nothing"] * 6, said
    assert (work / "mine").read_text() == "mine"
