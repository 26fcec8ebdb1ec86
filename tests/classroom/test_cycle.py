"""Every lab, released, graded and returned, with five made-up students."""

import itertools
import json
import re

import pytest
from cycle import spied
from students import EACH_LAB, answers, by_hand, is_task, is_test, marks, source, tasks

pytestmark = pytest.mark.parametrize("lab", EACH_LAB)


def test_the_lab_is_worth_100_points_and_has_one_answer_in_writing(lab):
    cells = source(lab).cells
    assert sum(marks(cell).get("points", 0) for cell in cells) == 100
    assert sum(map(by_hand, cells)) == 1
    assert set(answers(lab).ALTERNATIVE) == set(tasks(source(lab))), "an alternative for every task"
    headings = re.findall(r"^(#+) ", "\n".join(c.source for c in cells if c.cell_type == "markdown"), re.M)
    depths = [len(heading) for heading in headings]
    assert depths[0] == 1 and depths.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(depths)), depths
    assert re.search(r"^## If you finish early", "\n".join(c.source for c in cells), re.M)


def test_the_release_gives_nothing_away(lab, graded):
    cycle = graded(lab)
    assert cycle.planted not in cycle.release_text
    assert not re.search(r"(BEGIN|END) (SOLUTION|HIDDEN|MARK)", cycle.release_text)
    notebook = json.loads(cycle.release_text)
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"nbgrader", "editable", "deletable"}
        assert not cell.get("outputs") and not cell.get("attachments") and not cell.get("execution_count")
    for cell in cycle.released.cells:
        if is_task(cell):
            assert "raise NotImplementedError" in cell.source
        if is_test(cell):
            assert not cell.metadata.editable and not cell.metadata.deletable


def test_the_reference_gets_full_points(lab, graded):
    cycle = graded(lab)
    assert cycle.points("reference") == cycle.full()
    waiting = [name for name, (_, _, by_hand) in cycle.grades["reference"].items() if by_hand]
    assert len(waiting) == 1, "the written answer waits for somebody to read it"
    assert "look by hand" not in cycle.said["class"]


def test_another_right_answer_gets_full_points(lab, graded):
    cycle = graded(lab)
    assert cycle.points("alternative") == cycle.full()


def test_the_naive_answer_loses_what_it_should(lab, graded):
    cycle, (_, lost) = graded(lab), answers(lab).NAIVE
    full, points = cycle.full(), cycle.points("naive")
    assert lost and {name: full[name] - points[name] for name in full if full[name] != points[name]} == lost


def test_a_blank_submission_gets_nothing_and_waits_for_nobody(lab, graded):
    cycle = graded(lab)
    assert set(cycle.points("blank").values()) == {0}
    assert not any(by_hand for _, _, by_hand in cycle.grades["blank"].values())


def test_the_hostile_submission_is_graded_in_time_and_gets_nothing(lab, graded):
    cycle = graded(lab)
    assert set(cycle.points("hostile")) == set(cycle.full())
    assert set(cycle.points("hostile").values()) == {0}
    assert {
        name: most for name, (_, most, _) in cycle.grades["hostile"].items() if name in cycle.full()
    } == cycle.full()
    assert cycle.seconds < 400  # its limits are 12 seconds a cell, 120 in all; the rest is a busy machine's starting up
    outputs = json.dumps(cycle.autograded("hostile")["cells"])
    assert len(outputs) < 4_000_000 and "TooMuchOutput" in outputs and "This cell was not run" in outputs


def test_the_hostile_submission_reaches_nothing(lab, graded):
    cycle = graded(lab)
    spy = next(cell for cell in cycle.autograded("hostile").cells if cell.source.startswith("PATHS ="))
    said = "".join(output.get("text", "") for output in spy.outputs)
    assert said.count("no: ") > 30, said
    assert not re.search(r"^(READ|WROTE|FOUND|SENT)", said, re.M), said
    assert cycle.planted not in said
    assert not cycle.changed and not cycle.left
    paths = [str(path) for path in cycle.secrets if path.is_absolute()]
    assert spied(paths[:1], cycle.course.parent / "home").count("READ") >= 3, "the spy finds nothing even where it may"
