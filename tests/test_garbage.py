"""Collection stops while anybody wants it to, and then is as it was."""

import gc

import pytest

from irkit.garbage import uncollected


def test_it_goes_on_when_the_last_has_left() -> None:
    first, second = uncollected(), uncollected()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_what_was_made_meanwhile_is_old() -> None:
    with uncollected():
        made = [[] for _ in range(5000)]
    assert gc.get_count()[0] < len(made)
    assert gc.get_freeze_count() == 0


def test_it_goes_on_after_an_error() -> None:
    with pytest.raises(ValueError, match="wrong"), uncollected():
        raise ValueError("wrong")
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
