"""The lens view's Python side: what it holds, following a token, and its static twin."""

import re
import time
from typing import Any

import numpy as np
import pytest

import irkit
from irkit import view
from irkit.analysis import LogitLens
from irkit.errors import OptionError
from irkit.widgets.lens import LensView

TEXT = "hello, hello he"


@pytest.fixture(scope="module")
def tiny(tiny_path: Any) -> Any:
    with irkit.Session(tiny_path) as session:
        yield session


@pytest.fixture
def lens(tiny: Any) -> LogitLens:
    return tiny.lens(TEXT, k=4)


def numbers(data: bytes, kind: type, lens: LogitLens) -> np.ndarray:
    return np.frombuffer(data, kind).reshape(len(lens.layers), len(lens.positions), -1)


def test_it_holds_what_the_lens_holds(lens: LogitLens) -> None:
    shown = lens.view()
    np.testing.assert_array_equal(numbers(shown.ids, np.int32, lens), lens.ids)
    np.testing.assert_array_equal(numbers(shown.logprobs, np.float32, lens), lens.logprobs)
    np.testing.assert_array_equal(numbers(shown.kl, np.float32, lens)[..., 0], lens.kl)
    np.testing.assert_array_equal(numbers(shown.ranks, np.int32, lens)[..., 0], lens.ranks)
    assert shown.info["words"][str(lens.ids[1, 2, 3])] == lens.strings[1][2][3]
    assert (shown.layer, shown.position, shown.followed) == ("1", lens.positions[-1], "")


def test_following_a_token(lens: LogitLens) -> None:
    shown = view.lens(lens, shown="rank", layer="0", position=2)
    assert isinstance(shown, LensView)
    shown.follow("he")
    np.testing.assert_array_equal(numbers(shown.ranks, np.int32, lens)[..., 0], lens.rank("he"))
    np.testing.assert_array_equal(numbers(shown.probabilities, np.float32, lens)[..., 0], lens.probability("he"))
    assert shown.followed == "he"
    with pytest.raises(OptionError, match="'xy' is 2 tokens"):
        shown.follow("xy")


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_page_asks_to_follow(lens: LogitLens) -> None:
    shown = lens.view()
    token = int(lens.ids[0, 0, 1])
    shown._handle_custom_msg({"kind": "follow", "token": token}, [])
    until(lambda: shown.followed == lens.strings[0][0][1])
    np.testing.assert_array_equal(numbers(shown.ranks, np.int32, lens)[..., 0], lens.rank(token))
    shown._handle_custom_msg({"kind": "follow", "token": "xy"}, [])
    until(lambda: "'xy' is 2 tokens" in shown.problem)
    assert shown.followed == lens.strings[0][0][1]
    shown._handle_custom_msg({"kind": "follow", "token": 1 << 70}, [])
    until(lambda: "'xy'" not in shown.problem)
    assert shown.followed == lens.strings[0][0][1]


def test_what_cannot_be_chosen(lens: LogitLens) -> None:
    for chosen, message in (
        ({"layer": "7"}, "layer: there is no '7'"),
        ({"position": 99}, "position: there is no 99"),
        ({"shown": "beauty"}, "shown: .*'beauty'"),
        ({"kl": b""}, "there is no 'kl' to choose"),
    ):
        with pytest.raises(OptionError, match=message):
            lens.view(**chosen)


def test_the_twin_is_a_table_without_script(lens: LogitLens) -> None:
    twin = lens.view().twin()
    assert len(re.findall(r"<td", twin)) == len(lens.layers) * len(lens.positions)
    assert "<script" not in twin
    assert f"KL {lens.kl[0, 0]:.3f} nats" in twin


def test_the_verb_and_the_function_are_one(tiny: Any) -> None:
    whole, some = tiny.lens(TEXT), tiny.lens(TEXT, layers=[0], positions=[2, -1])
    assert some.layers == ("0",)
    assert some.positions == (2, len(whole.positions) - 1)
    np.testing.assert_allclose(some.kl, whole.kl[:1, [2, -1]], atol=1e-5)
    np.testing.assert_array_equal(some.chosen, whole.chosen[[2, -1]])
    np.testing.assert_array_equal(some.rank("he"), whole.rank("he")[:1, [2, -1]])
    steered = tiny.lens(TEXT, edits=[irkit.ablate("mlp_out", layers=1)])
    assert np.abs(steered.logprobs[0] - whole.logprobs[0]).max() < 1e-5
    assert np.abs(steered.logprobs[1] - whole.logprobs[1]).max() > 1e-3
