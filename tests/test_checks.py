"""What `check` reports for right and wrong answers, exceptions and stubs."""

import pytest
import torch

from pwlib.course import checks
from pwlib.course.checks import EXERCISES, Verdict, WrongAnswer, check, exercise, expect, expect_close, expect_shape


@pytest.fixture(autouse=True)
def a_check(monkeypatch):
    """Exercise "99.1": double a tensor."""
    monkeypatch.setattr(checks, "exercises", lambda notebook: EXERCISES)
    monkeypatch.setattr(checks, "EXERCISES", EXERCISES)

    @exercise("99.1", title="Double", minutes=1, difficulty=1)
    def double(answer):
        x = torch.rand(2, 3)
        expect_shape(answer(x), [2, 3], "the double")
        expect_close(answer(x), x + x, "the double", hints=[(x * x, "That is the square.")])
        return "Twice as much."

    yield
    del EXERCISES["99.1"]


def explode(x):
    raise KeyError("paint")


def stub(x):
    """Double x."""
    ...


def forgets_return(x):
    x = 2 * x


def returns_in_one_case(x):
    if x.sum() < 0:
        return 2 * x


@pytest.mark.parametrize(
    "answer, passed, fragment",
    [
        (lambda x: 2 * x, True, "Twice as much."),
        (lambda x: (2 * x).requires_grad_(), True, "Twice"),
        (lambda x: x * x, False, "That is the square."),
        (lambda x: 2 * x + torch.tensor([0.0, 0.5, 0.1]), False, "The double at index [0, 1] is"),
        (lambda x: (2 * x)[0], False, "shape [3]; expected [2, 3]"),
        (lambda x: x / 0 * 0, False, "holds NaN"),
        (lambda x: "twice", False, "type str"),
        (explode, False, "KeyError"),
        (forgets_return, False, "returns None"),
        (returns_in_one_case, False, "returns None"),
        (lambda x: (x.clone(), print(x))[1], False, "returns None"),
        (stub, None, "Fill in"),
        (lambda x: None, None, "Fill in"),
        (lambda x: (None, ...), None, "Fill in"),
        (lambda x: x + ..., None, "still a `...`"),
        (None, None, "Fill in"),
    ],
)
def test_answers(answer, passed, fragment):
    verdict = check("99.1", answer)
    assert verdict.passed is passed
    assert fragment in verdict.message


def test_an_exception_is_reported_with_its_line():
    assert f"in line {explode.__code__.co_firstlineno + 1} of its cell" in check("99.1", explode).message


def test_a_check_does_not_change_the_state_of_the_random_generator():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    check("99.1", lambda x: x + torch.rand(2, 3))
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("passed, word", [(True, "passed"), (False, "not right"), (None, "not yet")])
def test_a_verdict_is_shown_in_words_and_not_only_in_colour(passed, word):
    verdict = Verdict("99.1", passed, "1 < 2")
    assert word in repr(verdict) and word in verdict._repr_html_()
    assert "1 &lt; 2" in verdict._repr_html_()


def test_unknown_exercises_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"no exercise '99\.7'"):
        check("99.7", lambda x: x)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no exercises for notebook '98'"):
        check("98.1", lambda x: x)


def test_expectations():
    expect(True, "not raised")
    expect_close(torch.tensor([1.0, torch.nan]), [1.0, torch.nan])
    expect_close(1, 1 + 1e-6)
    with pytest.raises(WrongAnswer, match="no"):
        expect([], "no")
    with pytest.raises(WrongAnswer, match=r"The result is 1; expected 1\.1"):
        expect_close(1, 1.1)
    with pytest.raises(WrongAnswer, match=r"q of pixel 3 is 1; expected 1\.1"):  # the symbol q does not become Q
        expect_close(1, 1.1, "q of pixel 3")
    with pytest.raises(WrongAnswer, match="The key is None"):
        expect_close(None, 1, "the key")
    with pytest.raises(WrongAnswer, match="Too small"):
        expect_close(1, 5, hints=[(lambda a: a > 3, "Too large"), (lambda a: a < 3, "Too small")])
