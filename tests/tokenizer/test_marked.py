"""Marked text behaves as the real text, and keeps its marks where they belong."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.errors import OptionError
from irkit.tokenizer.marked import Marks

# What is outside text and what is not can be told by the letters.
OUTSIDE, OWN = "ab< \n", "AB> \n"
NAMES = ["<a", "b<", ">A", "B>"]

outside = st.text(OUTSIDE, max_size=8)
own = st.text(OWN, max_size=5)
argument = st.sampled_from(["a", "b", "<", "A", "B", ">", " ", "\n", "ab", "aA", "B<", "", "x"])
CUTS: list[Any] = [
    ("__str__", st.tuples()),
    ("strip", st.tuples()),
    ("lstrip", st.tuples()),
    ("rstrip", st.tuples(st.sampled_from(["a", " <", "AB"]))),
    ("removeprefix", st.tuples(argument)),
    ("removesuffix", st.tuples(argument)),
    ("split", st.tuples()),
    ("split", st.tuples(argument.filter(bool), st.integers(-1, 3))),
    ("rsplit", st.tuples(st.none(), st.integers(-1, 3))),
    ("rsplit", st.tuples(argument.filter(bool), st.integers(-1, 3))),
    ("splitlines", st.tuples(st.booleans())),
    ("partition", st.tuples(argument.filter(bool))),
    ("rpartition", st.tuples(argument.filter(bool))),
    ("__getitem__", st.tuples(st.slices(20))),
    ("replace", st.tuples(argument.filter(bool), st.just(""))),
]
QUESTIONS: list[Any] = [
    (name, st.tuples(argument))
    for name in ("__eq__", "__ne__", "__lt__", "__ge__", "__contains__", "startswith", "endswith", "find", "count")
]
QUESTIONS += [(name, st.tuples()) for name in ("isspace", "isalpha", "islower", "isupper", "__hash__", "__len__")]


def mixed(draw: st.DrawFn) -> tuple[Marks, str, str]:
    """A text made of our own and outside parts: marked, and plain."""
    parts = draw(st.lists(st.tuples(own, outside), max_size=4))
    marks = Marks(NAMES, ["taken"])
    marked = marks.adopt("".join(ours + marks.mark(theirs) for ours, theirs in parts))
    return marks, marked, "".join(ours + theirs for ours, theirs in parts)


texts = st.composite(mixed)()


@given(texts, st.sampled_from(CUTS), st.data())
def test_pieces_keep_their_marks(text: tuple[Marks, str, str], cut: Any, data: st.DataObject) -> None:
    marks, marked, plain = text
    name, arguments = cut
    values = data.draw(arguments)
    got, want = getattr(marked, name)(*values), getattr(plain, name)(*values)
    assert type(got) is type(want) or isinstance(got, str)
    for piece, real in zip([got], [want], strict=True) if isinstance(want, str) else zip(got, want, strict=True):
        assert marks.real(piece) == real
        assert [bool(flag) for flag in marks.marked(piece)] == [letter in "ab<" for letter in real]


@given(texts, st.sampled_from(QUESTIONS), st.data())
def test_questions_are_answered_as_by_the_real_text(
    text: tuple[Marks, str, str], question: Any, data: st.DataObject
) -> None:
    marks, marked, plain = text
    name, arguments = question
    values = data.draw(arguments)
    assert getattr(marked, name)(*values) == getattr(plain, name)(*values)
    if any(marks.marked(marked)):
        assert getattr(marked, name)(*map(marks.mark, values)) == getattr(plain, name)(*values)


@given(texts, st.sampled_from(["upper", "lower", "title", "capitalize", "casefold", "swapcase", "__repr__", "__str__"]))
def test_what_is_made_of_it_stays_marked(text: tuple[Marks, str, str], name: str) -> None:
    marks, marked, plain = text
    got = getattr(marked, name)()
    assert marks.real(got) == getattr(plain, name)()
    assert any(marks.marked(got)) or not any(marks.marked(marked))


def test_case_changes_where_it_should() -> None:
    marks = Marks(["<ßs>"], [])
    text = marks.adopt("<s>" + marks.mark("<ß>"))
    assert marks.real(text.upper()) == "<S><SS>"
    assert marks.marked(text.upper())[:3] == b"\0\0\0"
    assert any(marks.marked(text.upper())[3:])


@given(outside, st.sampled_from(["", "a", "<"]), outside)
def test_replacing(text: str, old: str, new: str) -> None:
    marks = Marks(NAMES, [])
    got = marks.mark(text).replace(old, marks.mark(new))
    assert marks.real(got) == text.replace(old, new)
    assert [bool(flag) for flag in marks.marked(got)] == [letter in "ab<" for letter in marks.real(got)]


def test_it_can_be_a_key() -> None:
    marks = Marks(NAMES, [])
    assert {marks.mark("ab"): 1}["ab"] == 1
    assert {"ab": 1}[marks.mark("ab")] == 1
    assert marks.mark("ab") in ["x", "ab"]


def test_stand_ins_are_characters_that_no_text_holds() -> None:
    first = "\U000f0000"
    assert Marks(["<"], []).real(first) == "<"
    marks = Marks(["<"], [first])
    assert marks.real(first + marks.mark("<")) == first + "<"
    assert marks.marked(first + marks.mark("<")) == b"\0\1"


def test_running_out_of_stand_ins_is_an_error() -> None:
    every = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(OptionError, match="private-use"):
        Marks(["<"], [every])
