"""The logit lens against the same computed in float64 from the captured streams."""

import math
from typing import Any

import numpy as np
import pytest

import irkit
from irkit import analysis, families
from irkit.as_json import as_json
from irkit.errors import OptionError

TEXT = "hello there, tiny model"


def unembedded(session: irkit.Session, streams: np.ndarray) -> np.ndarray:
    """Log-probabilities `[..., d_vocab]` of streams, in float64."""
    file, config = session.model.file, session.model.config
    weights = families.weights(file, config)
    norm, unembed = (families.read_weight(file, weights[name]) for name in ("ln_final", "unembed"))
    assert norm is not None
    assert unembed is not None
    x = streams.astype(np.float64)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.eps) * norm
    logits = x @ unembed.T.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def trace(tiny: irkit.Session) -> irkit.Trace:
    return tiny.trace(TEXT)


@pytest.fixture(scope="module")
def expected(tiny: irkit.Session, trace: irkit.Trace) -> np.ndarray:
    return unembedded(tiny, trace["resid_post"][:, 0])


def test_what_each_layer_says(tiny: irkit.Session, trace: irkit.Trace, expected: np.ndarray) -> None:
    lens = analysis.logit_lens(tiny, trace, k=3)
    order = np.argsort(-expected, axis=-1)[..., :3]
    np.testing.assert_array_equal(lens.ids, order)
    np.testing.assert_allclose(lens.logprobs, np.take_along_axis(expected, order, -1), atol=1e-4)
    final = expected[-1]
    np.testing.assert_allclose(lens.kl, (np.exp(final) * (final - expected)).sum(-1), atol=1e-4)
    np.testing.assert_array_equal(lens.kl[-1], 0)
    np.testing.assert_allclose(lens.entropy, -(np.exp(expected) * expected).sum(-1), atol=1e-4)
    assert lens.layers == ("0", "1")
    assert lens.tokens == trace.tokens
    assert lens.strings[1][-1][0] == tiny.model.tokenizer.token(int(order[1, -1, 0]))


def test_the_last_layer_says_what_the_model_does(tiny: irkit.Session, trace: irkit.Trace) -> None:
    lens = analysis.logit_lens(tiny, trace)
    logits = trace.logits[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(lens.logprobs[-1, :, 0], logprobs.max(-1), atol=1e-5)
    np.testing.assert_array_equal(lens.chosen, logits.argmax(-1))
    np.testing.assert_array_equal(lens.rank()[-1], 0)
    np.testing.assert_allclose(analysis.next_token_probs(tiny, TEXT)[0], np.exp(logprobs[-1]), atol=1e-6)


def test_rank_and_probability_of_a_token(tiny: irkit.Session, trace: irkit.Trace, expected: np.ndarray) -> None:
    lens = analysis.logit_lens(tiny, trace)
    for token in ("he", 17, lens.chosen):
        ids = np.broadcast_to(tiny.tokenize(token)[0] if isinstance(token, str) else token, len(trace.tokens))
        its = np.take_along_axis(expected, np.broadcast_to(ids[:, None], (*expected.shape[:2], 1)), -1)
        np.testing.assert_array_equal(lens.rank(token), (expected > its).sum(-1))
        np.testing.assert_allclose(lens.probability(token), np.exp(its[..., 0]), rtol=1e-3)
    np.testing.assert_array_equal(lens.rank(), lens.rank(lens.chosen))
    np.testing.assert_allclose(lens.probability()[-1], np.exp(lens.logprobs[-1, :, 0]), rtol=1e-5)


def test_more_positions_than_one_call_reads(tiny: irkit.Session) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 90).tolist()  # 64 in a call
    lens = analysis.logit_lens(tiny, ids, k=1)
    expected = unembedded(tiny, tiny.trace(ids, names="resid_post")["resid_post"][:, 0])
    np.testing.assert_allclose(lens.logprobs[..., 0], expected.max(-1), atol=1e-4)


def test_chosen_positions_and_the_embedding(tiny: irkit.Session, trace: irkit.Trace) -> None:
    whole = analysis.logit_lens(tiny, trace, embed=True)
    assert whole.layers == ("embed", "0", "1")
    some = analysis.logit_lens(tiny, tiny.trace(TEXT, names="resid_post", positions=(2, -1)))
    last = len(trace.tokens) - 1
    assert some.positions == (2, last)
    np.testing.assert_allclose(some.kl, whole.kl[1:, [2, last]], atol=1e-5)
    np.testing.assert_allclose(analysis.logit_lens(tiny, trace, positions=-1).kl[:, 0], some.kl[:, 1], atol=1e-5)
    enters = unembedded(tiny, trace["hook_embed"][0])
    np.testing.assert_allclose(whole.logprobs[0, :, 0], enters.max(-1), atol=1e-4)


def test_as_text_table_and_json(tiny: irkit.Session, trace: irkit.Trace) -> None:
    lens = analysis.logit_lens(tiny, trace, k=2)
    lines = repr(lens).splitlines()
    assert len(lines) == 2 + 2
    assert lines[1].split()[0] == "layer"
    assert repr(trace.tokens[-1]) in lines[1]
    assert repr(lens.strings[1][-1][0]) in lines[-1]
    assert f"{math.exp(lens.logprobs[1, -1, 0]):.2f}" in lines[-1]
    frame = lens.to_frame()
    assert len(frame) == 2 * len(trace.tokens) * 2
    row = frame[(frame.layer == "1") & (frame.position == 4) & (frame.place == 1)].iloc[0]
    assert row.id == lens.ids[1, 4, 1]
    assert row.prediction == lens.strings[1][4][1]
    assert row.kl == lens.kl[1, 4]
    plain: dict[str, Any] = as_json(lens)
    assert plain["kl"] == lens.kl.tolist()
    assert plain["strings"][0][0][0] == lens.strings[0][0][0]
    assert not any(callable(each) for each in plain.values())


def test_what_cannot_be_read(tiny: irkit.Session, trace: irkit.Trace) -> None:
    for wrong in (
        tiny.trace(TEXT, names="resid_post", layers=0),  # not the last layer
        tiny.trace(TEXT, names="resid_post", reduce="norm"),
        tiny.trace([TEXT, "hello"], names="resid_post"),
    ):
        with pytest.raises(OptionError, match=r"last layer|whole|one text"):
            analysis.logit_lens(tiny, wrong)
    with pytest.raises(OptionError, match="there is no 99"):
        analysis.logit_lens(tiny, trace, positions=99)
    with pytest.raises(OptionError, match="2 tokens, not one"):
        analysis.logit_lens(tiny, trace).rank("xy")
    with pytest.raises(OptionError, match="does not hold 0"):
        analysis.logit_lens(tiny, tiny.trace(TEXT, names="resid_post", positions=(2,)), positions=0)


def test_the_real_model(exact_session: irkit.Session) -> None:
    text = "The capital of France is"
    lens = analysis.logit_lens(exact_session, text)
    logits = exact_session.trace(text, names=(), logits="last").logits[0, -1].astype(np.float64)
    top = np.argsort(-logits)[:5]
    np.testing.assert_array_equal(lens.ids[-1, -1], top)
    np.testing.assert_allclose(lens.logprobs[-1, -1], (logits - np.log(np.exp(logits).sum()))[top], atol=1e-4)
    assert lens.strings[-1][-1][0] == " Paris"
    assert lens.rank(" Paris")[-1, -1] == 0 < lens.rank(" Paris")[0, -1]
    assert (np.diff(lens.kl[-5:, -1]) < 0).all()  # the last layers approach what is said
