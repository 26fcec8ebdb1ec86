"""Checks of the notebooks' exercises: `check("02.1", my_function)` reports which mistake an answer contains.

The checks of a notebook are in one module, such as `pwlib.course.checks.nb02`, which is imported when it is needed. A
check is a function that gets the learner's answer and is registered with `exercise`. It calls the answer on several
cases and compares the results with an independent computation. It raises `WrongAnswer` with a sentence that names the
mistake; for a right answer it returns None or a sentence to show.

    @exercise("02.1", title="The energy of a labelling", minutes=10, difficulty=2)
    def energy(answer):
        unary, labels = torch.rand(9, 3), torch.randint(3, (9,))
        wanted = sum(unary[i, labels[i]] for i in range(9))
        expect_close(answer(unary, labels), wanted, "the energy", hints=[(-wanted, "The sign is wrong: …")])
"""

from __future__ import annotations

import dis
import functools
import html
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class WrongAnswer(Exception):
    """The answer is wrong; the message names the mistake in one or two sentences."""


class NoAnswer(Exception):
    """There is no answer yet: the stub is unchanged, or a part of it is still `...`."""


@dataclass(frozen=True)
class Verdict:
    """The result of `check`, which a notebook displays. passed: True, False, or None if there is no answer yet."""

    exercise: str
    passed: bool | None
    message: str

    @property
    def headline(self) -> str:
        icon, word = {True: ("✓", "passed"), False: ("✗", "not right"), None: ("○", "not yet")}[self.passed]
        return f"{icon} Exercise {self.exercise}: {word}"

    def __repr__(self) -> str:
        return f"{self.headline}. {self.message}"

    def _repr_html_(self) -> str:
        # Blue, vermilion and grey of Okabe & Ito; icon and words carry the same information.
        colour = {True: "#0072B2", False: "#D55E00", None: "#777777"}[self.passed]
        return (
            f'<div role="status" style="border-left: 4px solid {colour}; padding: 0.3em 0.8em; margin: 0.3em 0">'
            f"<strong>{html.escape(self.headline)}.</strong> {html.escape(self.message)}</div>"
        )


@dataclass(frozen=True)
class Exercise:
    """A registered check. minutes: the estimated time; difficulty: 1 to 3 stars, both as printed in the notebook."""

    name: str
    title: str
    minutes: int
    difficulty: int
    checker: Callable[[Any], str | None]


EXERCISES: dict[str, Exercise] = {}


def exercise(name: str, *, title: str, minutes: int, difficulty: int) -> Callable:
    """Register the decorated function as the check of exercise `name` ("02.1": notebook 02, exercise 1)."""

    def register(checker: Callable[[Any], str | None]) -> Callable:
        if difficulty not in (1, 2, 3):
            raise ValueError(f"difficulty of exercise {name} is {difficulty}; expected 1, 2 or 3")
        EXERCISES[name] = Exercise(name, title, minutes, difficulty, checker)
        return checker

    return register


def exercises(notebook: str) -> dict[str, Exercise]:
    """Return {name: check} for one notebook.

    Args:
        notebook: its number, such as "02".

    Raises:
        ValueError: if the notebook has no checks.
    """
    module = f"{__name__}.nb{notebook}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"there are no exercises for notebook {notebook!r}; expected a number such as '02'") from None
    return {name: entry for name, entry in EXERCISES.items() if name.startswith(f"{notebook}.")}


def check(name: str, answer: Any) -> Verdict:
    """Check the answer to an exercise.

    An exception in the answer is reported with its type and line. Random cases are the same in every call, and the
    state of the notebook's random generator does not change.

    Args:
        name: the exercise, such as "02.1".
        answer: the learner's answer, in most exercises a function.

    Raises:
        ValueError: if there is no such exercise.
    """
    known = exercises(name.partition(".")[0])
    if name not in known:
        raise ValueError(f"there is no exercise {name!r}; expected one of {', '.join(known)}")
    try:
        if _empty(answer):
            raise NoAnswer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            praise = known[name].checker(_guarded(answer))
    except NoAnswer:
        return Verdict(name, None, "Fill in the cell above, run it, then run this cell again.")
    except WrongAnswer as wrong:
        return Verdict(name, False, str(wrong))
    except Exception as error:
        return _failed(name, answer, error)
    return Verdict(name, True, praise or "Your answer agrees with the check on every case.")


def expect(condition: object, message: str) -> None:
    """Raise `WrongAnswer(message)` unless the condition holds."""
    if not condition:
        raise WrongAnswer(message)


def expect_shape(actual: Any, shape: Sequence[int], what: str = "the result") -> None:
    """Raise `WrongAnswer` unless `actual` is a tensor, array or number of this shape; messages call it `what`."""
    tensor = _tensor(actual, what)
    if tuple(tensor.shape) != tuple(shape):
        raise WrongAnswer(f"{_upper(what)} has shape {list(tensor.shape)}; expected {list(shape)}.")


def expect_close(
    actual: Any,
    wanted: Any,
    what: str = "the result",
    *,
    hints: Sequence[tuple[Any, str]] = (),
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Raise `WrongAnswer` unless `actual` has the shape and the values of `wanted`; NaN equals NaN.

    Args:
        what: the name of the result, for messages.
        hints: (mistake, message) pairs. The first mistake that fits a wrong answer decides the message. A mistake is
            the result of a known slip, of any shape, or a predicate of the answer (a float64 tensor). If none fits,
            the message shows the entry with the largest error.
        rtol, atol: the tolerance of each entry is atol + rtol |wanted|.
    """
    actual, wanted = _tensor(actual, what), _tensor(wanted, what)
    near = functools.partial(torch.allclose, rtol=rtol, atol=atol, equal_nan=True)
    if actual.shape == wanted.shape and near(actual, wanted):
        return
    for mistake, message in hints:
        if callable(mistake):
            fits = bool(mistake(actual))
        else:
            slip = _tensor(mistake, what)
            fits = slip.shape == actual.shape and near(actual, slip)
        if fits:
            raise WrongAnswer(message)
    expect_shape(actual, wanted.shape, what)
    if torch.isnan(actual).any() and not torch.isnan(wanted).any():
        raise WrongAnswer(f"{_upper(what)} holds NaN: look for 0/0, log 0 or infinity minus infinity.")
    # NaN on one side only counts as an infinite error.
    gap = torch.where(actual.isnan() & wanted.isnan(), 0, (actual - wanted).abs()).nan_to_num(nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)) if gap.ndim else ()
    where = f" at index {list(worst)}" if worst else ""
    raise WrongAnswer(f"{_upper(what)}{where} is {actual[worst].item():.6g}; expected {wanted[worst].item():.6g}.")


def _tensor(value: Any, what: str) -> torch.Tensor:
    if value is ...:
        raise NoAnswer(f"{what} is still `...`")
    if value is None:
        raise WrongAnswer(f"{_upper(what)} is None; expected a tensor or a number.")
    try:
        return torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise WrongAnswer(f"{_upper(what)} is of type {type(value).__name__}; expected a tensor or a number.") from None


def _upper(what: str) -> str:
    """Capitalise a noun phrase at the start of a sentence; names of variables, such as q, stay as they are."""
    return f"T{what[1:]}" if what.startswith("the ") else what


def _empty(value: Any) -> bool:
    return (
        value is None or value is ... or (isinstance(value, tuple | list) and bool(value) and all(map(_empty, value)))
    )


def _is_stub(function: Callable) -> bool:
    """Whether a function does nothing but return a constant, as `def f(x): ...` does."""
    trivial = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}
    return all(instruction.opname in trivial for instruction in dis.get_instructions(function))


def _guarded(answer: Any) -> Any:
    """Wrap a learner's function so that a result of None raises `NoAnswer` for a stub and `WrongAnswer` otherwise."""
    if not inspect.isfunction(answer):
        return answer

    @functools.wraps(answer)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        if _empty(result):
            if _is_stub(answer) or result is not None:
                raise NoAnswer
            raise WrongAnswer("Your function returns None: a `return` is missing, or in this case it is not reached.")
        return result

    return guarded


def _failed(name: str, answer: Any, error: Exception) -> Verdict:
    """Report an exception that the learner's code raised, or the check on an unexpected result."""
    if "ellipsis" in str(error):
        return Verdict(name, None, "There is still a `...` in your code; replace it and run this cell again.")
    line = None
    if inspect.isfunction(answer):
        file = answer.__code__.co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = lines[-1] if lines else None
    where = f" in line {line} of its cell" if line else ""
    return Verdict(name, False, f"Your code stops{where} with {type(error).__name__}: {error}")
