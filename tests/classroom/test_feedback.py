"""The pages that go back to the students, as a browser shows them."""

import re

import pytest
from students import EACH_LAB, answers

pytestmark = [pytest.mark.browser, pytest.mark.parametrize("lab", EACH_LAB)]


@pytest.fixture
def page(browser):
    """A page that reaches no other host: nbgrader's template asks for MathJax and fonts."""
    context = browser.new_context(viewport={"width": 1000, "height": 1200})
    page = context.new_page()
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    yield page
    context.close()


def test_pages_show_points_and_the_students_own_outputs(lab, graded, page, tmp_path):
    cycle, (codes, lost) = graded(lab), answers(lab).NAIVE
    full = sum(cycle.full().values())
    for student, points in (("reference", full), ("naive", full - sum(lost.values())), ("blank", 0)):
        page.goto(cycle.feedback(student).as_uri())
        text = page.locator("body").inner_text()
        assert re.search(rf"Score:\s*{points:.1f}\s*/\s*100\.0", text), text[:300]
        assert cycle.planted not in page.content()
        page.screenshot(path=tmp_path / f"{student}.png", full_page=True)
        code = next(iter(codes.values())).strip().splitlines()
        wanted = max(code, key=len).strip()
        if student == "naive":
            assert re.sub(r"\s+", "", wanted) in re.sub(r"\s+", "", text), "the student's own code"
            told = [
                cell
                for cell in cycle.autograded("naive").cells
                if cell.metadata.get("nbgrader", {}).get("grade_id") in lost
            ]
            for cell in told:
                (error,) = [output for output in cell.outputs if output.output_type == "error"]
                assert re.sub(r"\s+", "", error.evalue) in re.sub(r"\s+", "", text), "what the test said"


def test_a_students_script_does_not_run_in_the_page(lab, graded, page):
    page.goto(graded(lab).feedback("hostile").as_uri())
    page.wait_for_timeout(500)
    assert page.evaluate("window.taken") is None
    assert page.locator("a[href^='javascript']").count() == 0
