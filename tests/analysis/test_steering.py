"""Steering vectors: the arithmetic, and that an answer follows them."""

import numpy as np
import pytest

import irkit
from irkit import analysis
from irkit.errors import OptionError

GLAD = ["I love this, it is wonderful.", "What a great, happy day!"]
UNHAPPY = ["I hate this, it is terrible.", "What an awful, sad day!"]


def test_it_is_the_difference_of_the_mean_streams_without_the_first_position(exact_session):
    found = analysis.steering_vector(exact_session, GLAD, UNHAPPY[:1], layer=-2)
    streams = [
        exact_session.trace(text, names="resid_post", layers=28)["resid_post", 28][0] for text in (*GLAD, UNHAPPY[0])
    ]
    means = [stream[1:].mean(axis=0) for stream in streams]
    np.testing.assert_allclose(found.vector, (means[0] + means[1]) / 2 - means[2], atol=1e-3)
    assert found.layer == 28
    last = analysis.steering_vector(exact_session, GLAD[0], UNHAPPY[0], layer=28, pooling="last")
    np.testing.assert_allclose(last.vector, streams[0][-1] - streams[2][-1], atol=1e-3)


def test_an_answer_follows_the_direction_and_its_opposite(session):
    direction = analysis.steering_vector(session, GLAD, UNHAPPY, layer=14)
    good, bad = (session.tokenize(word)[0] for word in (" amazing", " terrible"))

    def leaning(strength: float) -> float:
        edits = [direction.edit(strength)]
        logits = session.trace("The food in the restaurant was", names=(), logits="last", edits=edits).logits[0, -1]
        return float(logits[good] - logits[bad])

    assert leaning(-1.5) < leaning(0) - 1 < leaning(1.5) - 2


def test_its_text_names_both_sides_and_its_edit_is_a_plain_one(session):
    direction = analysis.steering_vector(session, "glad", "sad", layer=3)
    assert str(direction).startswith("glad − sad, layer 3: ")
    assert repr(direction.edit(2.0, layers=[4, 5])) == repr(irkit.steer(direction.vector, [4, 5], 2.0))


@pytest.mark.parametrize(
    ("positive", "negative", "options", "words"),
    [
        ([], ["a"], {"layer": 3}, "positive: there is no text"),
        (["a"], [], {"layer": 3}, "negative: there is no text"),
        (["a"], ["b"], {"layer": 30}, "30"),
        (["a"], ["b"], {"layer": 3, "pooling": "first"}, "'first' is neither 'mean' nor 'last'"),
    ],
)
def test_what_cannot_be_is_said(session, positive, negative, options, words):
    with pytest.raises(OptionError, match=words):
        analysis.steering_vector(session, positive, negative, **options)
