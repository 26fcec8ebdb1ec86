"""Checks for the notebooks' exercises: `check("02.1", my_function)` says what is wrong, not only that something is.

Each notebook's checks live in a module of their own, `pwlib.course.checks.nb02`, imported when first asked for. A
check is a function of the learner's answer, registered with `exercise`; it calls the answer on several cases and
compares it with an oracle of its own. It raises `Wrong`, with one sentence that names the
mistake, or returns (a sentence, if it likes).

    @exercise("02.1", title="The energy of a labelling", minutes=10, difficulty=2)
    def energy(answer):
        unary, labels = torch.rand(9, 3), torch.randint(3, (9,))
        wanted = sum(unary[i, labels[i]] for i in range(9))
        expect_close(answer(unary, labels), wanted, "the energy", hints=[(-wanted, "The sign is wrong: …")])
"""

from __future__ import annotations

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


class Wrong(Exception):
    """The learner's answer is wrong; the message is one sentence or two that name the mistake."""


class NotYet(Exception):
    """The learner has not answered yet: the stub still returns None or `...`."""


@dataclass(frozen=True)
class Verdict:
    """What `check` says. passed: True, False, or None where there is no answer yet. Shows itself in a notebook."""

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
        # Blue, vermilion and grey of Okabe & Ito; the icon and the words say the same without colour.
        colour = {True: "#0072B2", False: "#D55E00", None: "#777777"}[self.passed]
        return (
            f'<div role="status" style="border-left: 4px solid {colour}; padding: 0.3em 0.8em; margin: 0.3em 0">'
            f"<strong>{html.escape(self.headline)}.</strong> {html.escape(self.message)}</div>"
        )


@dataclass(frozen=True)
class Exercise:
    """A registered check. difficulty: 1 to 3 stars; minutes: an estimate, as the notebook prints it."""

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
    """All checks of one notebook ("02"), by name; ValueError where the notebook has none."""
    module = f"{__name__}.nb{notebook}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"there are no exercises for notebook {notebook!r}; expected a number such as '02'") from None
    return {name: entry for name, entry in EXERCISES.items() if name.startswith(f"{notebook}.")}


def check(name: str, answer: Any) -> Verdict:
    """Judge the learner's answer (a function, mostly) to exercise `name`.

    Never raises for a learner's mistake: an exception inside the answer becomes a verdict with its type and line.
    The check's random numbers are the same every time and leave the notebook's own generator alone.
    ValueError for an exercise that does not exist.
    """
    known = exercises(name.partition(".")[0])
    if name not in known:
        raise ValueError(f"there is no exercise {name!r}; expected one of {', '.join(known)}")
    try:
        if _empty(answer):
            raise NotYet
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            praise = known[name].checker(_guarded(answer))
    except NotYet:
        return Verdict(name, None, "Fill in the cell above, run it, then run this cell again.")
    except Wrong as wrong:
        return Verdict(name, False, str(wrong))
    except Exception as error:
        return _failed(name, answer, error)
    return Verdict(name, True, praise or "Your answer agrees with the check on every case.")


def expect(condition: object, message: str) -> None:
    """Raise Wrong(message) unless the condition holds."""
    if not condition:
        raise Wrong(message)


def expect_shape(actual: Any, shape: Sequence[int], what: str = "the result") -> None:
    """Raise Wrong unless `actual` is a tensor, array or number of this shape; `what` names it in the message."""
    tensor = _tensor(actual, what)
    if tuple(tensor.shape) != tuple(shape):
        raise Wrong(f"{_upper(what)} has shape {list(tensor.shape)}; expected {list(shape)}.")


def expect_close(
    actual: Any,
    wanted: Any,
    what: str = "the result",
    *,
    hints: Sequence[tuple[Any, str]] = (),
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Raise Wrong unless `actual` equals `wanted`: same shape, every number within atol + rtol |wanted|.

    hints: (mistake, message) pairs, tried in order on a wrong answer. A mistake is the value that a known slip would
    give (any shape), or a predicate of the answer (float64 tensor). Without a hint that fits, the message shows the
    entry that is farthest off. NaN equals NaN.
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
            raise Wrong(message)
    expect_shape(actual, wanted.shape, what)
    if torch.isnan(actual).any() and not torch.isnan(wanted).any():
        raise Wrong(f"{_upper(what)} holds NaN: look for 0/0, log 0 or infinity minus infinity.")
    # NaN on one side only is farther off than any number.
    gap = torch.where(actual.isnan() & wanted.isnan(), 0, (actual - wanted).abs()).nan_to_num(nan=math.inf)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)) if gap.ndim else ()
    where = f" at index {list(worst)}" if worst else ""
    raise Wrong(f"{_upper(what)}{where} is {actual[worst].item():.6g}; expected {wanted[worst].item():.6g}.")


def _tensor(value: Any, what: str) -> torch.Tensor:
    if _empty(value):
        raise NotYet
    try:
        return torch.as_tensor(value).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{_upper(what)} is of type {type(value).__name__}; expected a tensor or a number.") from None


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _empty(value: Any) -> bool:
    return (
        value is None or value is ... or (isinstance(value, tuple | list) and bool(value) and all(map(_empty, value)))
    )


def _guarded(answer: Any) -> Any:
    """A learner's function that says NotYet where it returns nothing; anything else as it is."""
    if not inspect.isfunction(answer):
        return answer

    @functools.wraps(answer)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        result = answer(*args, **kwargs)
        if _empty(result):
            raise NotYet
        return result

    return guarded


def _failed(name: str, answer: Any, error: Exception) -> Verdict:
    """A verdict on an exception: in the learner's lines, or in the check for an answer it could not read."""
    if "ellipsis" in str(error):
        return Verdict(name, None, "There is still a `...` in your code; replace it and run this cell again.")
    line = None
    if inspect.isfunction(answer):
        file = answer.__code__.co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = lines[-1] if lines else None
    where = f" in line {line} of its cell" if line else ""
    return Verdict(name, False, f"Your code stops{where} with {type(error).__name__}: {error}")
