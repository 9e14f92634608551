"""Stop strings across the borders of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.engine.stopping import StopStrings, overlap

TEXT = st.text("ab<", max_size=30)


@given(TEXT, st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    stopper, shown, rest = StopStrings(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += stopper.push(rest[:size])
        rest = rest[size:]
        ends = [shown.find(stop) for stop in stops]
        assert all(end < 0 for end in ends), "a stop string was shown"
    shown += stopper.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == (text[: min(found)[1]] if found else text)
    assert stopper.found == bool(found)


@pytest.mark.parametrize("pieces", [["<a<"], ["<", "a", "<"], ["<a", "<"], ["<", "a<"]])
def test_of_two_that_overlap_the_division_into_tokens_does_not_choose(pieces: list[str]) -> None:
    stopper = StopStrings(["a", "<a<"])
    assert "".join(map(stopper.push, pieces)) + stopper.flush() == "<"


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    stopper = StopStrings(["</s>"])
    assert stopper.push("a <b> <") == "a <b> "
    assert stopper.push("/") == ""
    assert stopper.push("x") == "</x"
    assert stopper.push("</s> more") == ""
    assert stopper.found
    assert stopper.push("more") == ""


@given(TEXT, st.text("ab<", min_size=1, max_size=5))
def test_overlap(text: str, stop: str) -> None:
    n = overlap(text, stop)
    assert n < len(stop)
    assert text.endswith(stop[:n])
    assert not any(text.endswith(stop[:longer]) for longer in range(n + 1, len(stop)))
