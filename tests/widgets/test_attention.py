"""The attention view's Python side: what it scores, what it sends, and its static twin."""

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from irkit import view
from irkit.errors import OptionError
from irkit.trace import Provenance, Trace
from irkit.widgets.attention import AttentionView, head_scores, thumbnails

TEXT = "The cat sat. The cat"


def causal(layers: int, heads: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Random attention patterns `[layer, head, query, key]`."""
    rng = np.random.default_rng(seed)
    weights = np.tril(rng.uniform(size=(layers, heads, tokens, tokens)) ** 8)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def trace_of(patterns: np.ndarray, ids: list[int]) -> Trace:
    def held(layer: int) -> Callable[[], np.ndarray]:
        return lambda: patterns[layer][None]

    values = {f"blocks.{layer}.attn.hook_pattern": held(layer) for layer in range(len(patterns))}
    made = Provenance("tiny", "tiny.gguf", "fast", ("attn.hook_pattern",))
    return Trace([ids], [[f"t{i}" for i in ids]], values, lambda: None, made, len(patterns), patterns.nbytes)


def recorded(shown: AttentionView) -> list[tuple[Any, Any]]:
    """What it sends from now on: messages with their buffers."""
    sent: list[tuple[Any, Any]] = []

    def send(content: Any, buffers: Any = None) -> None:
        sent.append((content, buffers))

    shown.send = send
    return sent


def test_scores_of_heads_that_do_one_thing() -> None:
    ids = [5, 6, 7, 5, 6, 7, 5]
    n = len(ids)
    previous = np.eye(n, k=-1)
    previous[0, 0] = 1
    even = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    induction = np.zeros((n, n))
    induction[:3, 0] = 1
    induction[np.arange(3, n), np.arange(1, n - 2)] = 1
    scores = head_scores([np.stack([previous, even, induction])], np.arange(n), ids)
    assert scores["previous_token"][0] == pytest.approx([1, np.mean(1 / np.arange(2, n + 1)), 1 / 6])
    assert scores["induction"][0] == pytest.approx([0, np.mean(1 / np.arange(4, n + 1)), 1])
    assert scores["entropy"][0] == pytest.approx([0, np.mean(np.log(np.arange(2, n + 1))), 0], abs=1e-9)


def test_a_text_without_repeats_has_no_induction_score() -> None:
    assert "induction" not in head_scores(causal(1, 2, 4)[0][None], np.arange(4), [1, 2, 3, 4])
    with pytest.raises(OptionError, match="there is no induction score"):
        AttentionView(trace_of(causal(1, 2, 4), [1, 2, 3, 4]), sort="induction")


def test_what_cannot_be_chosen() -> None:
    trace = trace_of(causal(1, 2, 4), [1, 2, 3, 4])
    with pytest.raises(OptionError, match=r"there is no 'laier' to choose; there are layer, head"):
        trace.view(laier=3)
    with pytest.raises(OptionError, match=r"sort: .*'beauty'"):
        trace.view(sort="beauty")


@pytest.mark.parametrize("count", [1, 2, 47, 48, 49, 100, 512])
def test_thumbnails_keep_the_largest_weights_and_the_first_key_apart(count: int) -> None:
    pattern = causal(1, 2, count)[0]
    small = thumbnails(pattern, np.arange(count))
    assert small.shape == (2, min(count, 48), min(count, 48))
    back = ((small[:, :, 1:].astype(float) - 1) / 254) ** 2
    if count > 1:
        assert back.max() == pytest.approx(pattern[:, :, 1:].max(), abs=0.005)
    assert small[:, -1].min() >= 1
    if count > 1:
        assert not small[:, 0, -1].any()  # the future
    if count <= 48:
        expected = np.where(np.tril(np.ones((count, count))) > 0, 1 + np.rint(254 * np.sqrt(pattern)), 0)
        np.testing.assert_array_equal(small, expected)


def test_a_head_is_sent_in_full_when_it_is_asked_for(session: Any) -> None:
    trace = session.trace(TEXT, names="pattern", logits="none")
    shown = trace.view()
    sent = recorded(shown)
    shown._handle_custom_msg({"kind": "head", "layer": 7, "head": 3}, [])
    (message, (buffer,)), pattern = sent[0], trace["pattern", 7][0, 3]
    assert (message["layer"], message["head"]) == (7, 3)
    np.testing.assert_array_equal(np.frombuffer(buffer, np.float32), pattern[np.tril_indices(len(pattern))])
    for nonsense in ({"kind": "head", "layer": 99, "head": 3}, {"kind": "head", "layer": 7, "head": 99}, {}):
        shown._handle_custom_msg(nonsense, [])
    assert len(sent) == 1


def test_it_begins_with_the_head_that_induces_most(session: Any) -> None:
    shown = view.attention(session.trace(TEXT, names="pattern", logits="none"))
    scores = np.reshape(shown.info["scores"]["induction"], (30, 9))
    assert scores[shown.layer, shown.head] == scores.max() > 0.3
    assert len(shown.thumbnails) == 270 * len(shown.info["tokens"]) ** 2


def test_some_layers_heads_and_positions(session: Any) -> None:
    trace = session.trace(TEXT, names="pattern", layers=[3, 8], heads=[1, 4], positions=[2, 5], logits="none")
    shown = AttentionView(trace, layer=8, head=4)
    sent = recorded(shown)
    assert (shown.info["layers"], shown.info["heads"], shown.info["queries"]) == ([3, 8], [1, 4], [2, 5])
    shown._handle_custom_msg({"kind": "head", "layer": 3, "head": 4}, [])
    pattern = trace["pattern", 3][0, 1]
    expected = np.concatenate([pattern[0, :3], pattern[1, :6]])
    np.testing.assert_array_equal(np.frombuffer(sent[0][1][0], np.float32), expected)
    with pytest.raises(OptionError, match=r"layer: there is no 4 in the trace; it holds 3, 8"):
        AttentionView(trace, layer=4)
    with pytest.raises(OptionError, match=r"head: there is no 0"):
        AttentionView(trace, head=0)


def test_one_token_of_an_answer_and_one_text_of_a_batch(session: Any) -> None:
    answer = session.generate("The capital of France is", temperature=0, num_predict=2, capture="pattern")
    shown = answer.tokens[1].captures.view()
    assert shown.info["queries"] == [5]
    assert shown.info["tokens"] == ["0", "1", "2", "3", "4", " Paris"]
    assert "<img" in shown.twin()
    batch = session.trace(["One two three four", "One"], names="pattern", logits="none")
    assert len(view.attention(batch, text=1).info["tokens"]) == 1
    with pytest.raises(OptionError, match="text: there is no 2"):
        batch.view(text=2)


def test_what_has_no_patterns_says_so(session: Any) -> None:
    with pytest.raises(OptionError, match="holds no attention patterns"):
        session.trace("One", names="resid_post").view()
    with pytest.raises(OptionError, match="the pattern's entropy, not the pattern"):
        session.trace("One", names="pattern", reduce="entropy").view()


def test_the_twin_is_html_without_script() -> None:
    twin = AttentionView(trace_of(causal(3, 4, 9), [1, 2, 3, 1, 2, 3, 1, 2, 3])).twin()
    pictures = re.findall(r'<img [^>]*src="data:image/png;base64,([^"]+)"', twin)
    assert len(pictures) == 2
    assert all(base64.b64decode(each).startswith(b"\x89PNG") for each in pictures)
    assert "<script" not in twin
    assert re.search(r"highest induction score: L\dH\d 0\.\d\d", twin)
