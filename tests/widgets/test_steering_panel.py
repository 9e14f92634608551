"""The steering panel's Python side: what it edits, what it answers, and that a slider compiles nothing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ipywidgets import Widget

import irkit
from irkit import view
from irkit.engine import programs
from irkit.engine import runtime as runtime_module
from irkit.errors import OptionError
from irkit.widgets.steering import SteeringPanel

PROMPT = "hello, hello"
SHORT: dict[str, Any] = {"num_predict": 12, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tiny_path: Any) -> Iterator[irkit.Session]:
    with irkit.Session(tiny_path, num_ctx=1 << 20) as session:  # answers that only Stop ends
        yield session


@pytest.fixture
def panel(tiny: irkit.Session) -> Iterator[SteeringPanel]:
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=64) for name in ("up", "down")}
    made = tiny.steering(vectors, prompt=PROMPT, as_message=False, live=False, **SHORT)
    yield made
    made.close()


def answered(panel: SteeringPanel) -> tuple[Any, Any]:
    """Both answers, made."""
    before = panel.answers.get("run", 0)
    panel.answer()
    for _ in range(600):
        if (panel.answers.get("run", 0) > before and not panel.running) or panel.problem:
            break
        panel._stop.wait(0.1)
    assert panel.problem == ""
    assert panel.unedited is not None
    assert panel.edited is not None
    return panel.unedited, panel.edited


def set_vector(panel: SteeringPanel, name: str, **values: Any) -> None:
    panel.vectors = [{**row, **(values if row["name"] == name else {})} for row in panel.vectors]


def test_what_is_chosen_is_what_generate_takes(panel: SteeringPanel, tiny: irkit.Session) -> None:
    assert panel.edits == ()
    unedited, edited = answered(panel)
    assert unedited is edited
    assert unedited.text == tiny.generate(PROMPT, **SHORT).text
    set_vector(panel, "up", strength=40.0, layer=1)
    panel.heads, panel.layers = [[0, 2, 0.0], [1, 3, 0.5]], [["mlp", 1, 0.25]]
    unedited, edited = answered(panel)
    assert unedited.text == tiny.generate(PROMPT, **SHORT).text
    assert [token.id for token in edited.tokens] != [token.id for token in unedited.tokens]
    again = tiny.generate(PROMPT, edits=panel.edits, **SHORT)
    assert [token.id for token in again.tokens] == [token.id for token in edited.tokens]
    assert panel.words() == ["+40 × up at layer 1", "layer 0 head 2 × 0", "layer 1 head 3 × 0.5", "layer 1 MLP × 0.25"]
    # The same, one by one.
    up = panel._vectors["up"]
    one_by_one = [irkit.steer(up, 1, 40.0), irkit.ablate("z", 0, 2), irkit.scale("z", 0.5, 1, 3)]
    one_by_one += [irkit.scale("mlp_out", 0.25, 1)]
    ids = tiny.tokenize(PROMPT)
    expected, found = (tiny.trace(ids, names=(), edits=each).logits for each in (one_by_one, panel.edits))
    np.testing.assert_array_equal(found, expected)


def test_moving_sliders_compiles_nothing(panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    set_vector(panel, "up", strength=1.0)
    answered(panel)
    panel.heads = [[0, 0, 0.0]]
    answered(panel)
    made: list[str] = []

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        made.append(function.__name__)
        return programs.load_or_compile(function, *arguments, **options)

    monkeypatch.setattr(runtime_module, "load_or_compile", counted)
    for step in range(4):
        set_vector(panel, "down", strength=float(step), layer=step % 2, positions=["all", "answer"][step % 2])
        panel.heads = [[step % 2, head, 0.5 * step] for head in range(step)]
        panel.layers = [["attn", step % 2, 0.1 * step]] * (step % 3)
        answered(panel)
    assert made == []
    panel.heads, panel.layers = [], []  # to vectors alone, which were there before
    answered(panel)
    assert made == []
    panel.add("third", np.ones(64), strength=1.0)
    answered(panel)
    assert made  # the count can tell


def test_both_have_one_seed_where_they_are_drawn(panel: SteeringPanel) -> None:
    panel.controls.set(temperature=1.5, seed=-1, num_predict=20)
    panel.heads = [[0, 0, 1.0]]  # which changes nothing, and is no edit
    assert panel.edits == ()
    set_vector(panel, "up", strength=1e-30)  # an edit that changes nothing either
    unedited, edited = answered(panel)
    assert edited is not unedited
    assert [token.id for token in edited.tokens] == [token.id for token in unedited.tokens]
    first = [token.id for token in unedited.tokens]
    assert first != [token.id for token in answered(panel)[0].tokens]


def test_the_page_is_told_of_both_a_part_at_a_time(panel: SteeringPanel, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(panel, "send", lambda message, buffers=None: sent.append(message))
    set_vector(panel, "up", strength=40.0)
    panel.controls.set(num_predict=40)
    unedited, edited = answered(panel)
    for side, generation in enumerate((unedited, edited)):
        ids: list[int] = []
        for message in sent:
            assert message["begin"][side] == len(ids)
            ids += [token[1] for token in message["sides"][side]["tokens"]]
        assert ids == [token.id for token in generation.tokens]
    text, token, logprob, top = sent[0]["sides"][0]["tokens"][0]
    assert (text, token) == (unedited.tokens[0].text, unedited.tokens[0].id)
    assert logprob == pytest.approx(unedited.tokens[0].logprob, abs=1e-3)
    assert len(top) == 8
    assert panel.answers["sides"][1]["tokens"] == [each for message in sent for each in message["sides"][1]["tokens"]]
    sent.clear()
    panel._handle_custom_msg({"kind": "state"}, [])
    assert [len(side["tokens"]) for side in sent[0]["sides"]] == [len(unedited.tokens), len(edited.tokens)]


def test_nothing_is_left_of_a_panel_that_was_closed(tiny: irkit.Session) -> None:
    def there() -> set[str]:
        return set(Widget.get_manager_state()["state"])

    before = there()
    panel = view.steering(tiny, {"up": np.ones(64)}, prompt=PROMPT, as_message=False, live=False, **SHORT)
    panel.show()
    assert len(there() - before) > 20
    panel.close()
    assert there() <= before


def test_stop_ends_both_and_another_answer_overtakes(tiny: irkit.Session) -> None:
    endless: dict[str, Any] = {"num_predict": -1, "logit_bias": {257: -1e4}}
    panel = view.steering(tiny, {"up": np.ones(64)}, prompt=PROMPT, as_message=False, live=False, **endless)
    set_vector(panel, "up", strength=1.0)
    panel._handle_custom_msg({"kind": "answer"}, [])
    while panel.unedited is None or not panel.unedited.partial_tokens:
        panel._stop.wait(0.02)
    overtaken = panel.unedited
    panel.answer()
    overtaken.wait()
    assert overtaken.finish_reason == "cancelled"
    while panel.unedited is overtaken or not panel.unedited.partial_tokens:
        panel._stop.wait(0.02)
    panel._handle_custom_msg({"kind": "stop"}, [])
    reasons = [each.wait().finish_reason for each in (panel.unedited, panel.edited) if each]
    assert reasons == ["cancelled", "cancelled"]
    panel.close()


def test_what_cannot_be_is_said(panel: SteeringPanel, tiny: irkit.Session) -> None:
    with pytest.raises(OptionError, match="64 finite numbers"):
        tiny.steering({"wide": np.ones(63)})
    with pytest.raises(OptionError, match="temprature"):
        tiny.steering(temprature=1)
    with pytest.raises(OptionError, match="there is no 2"):
        panel.add("up", np.ones(64), layer=2)
    for nonsense in ([[0, 9, 0.0]], [[7, 0, 0.0]], [["x"]]):
        panel.heads = nonsense
        with pytest.raises(OptionError, match="nothing to edit like"):
            panel.edits  # noqa: B018
    panel.heads = [[0, 9, 0.0]]
    panel.answer()
    while not panel.problem:
        panel._stop.wait(0.02)
    assert "nothing to edit like" in panel.problem


def test_a_vector_from_two_kinds_of_text_on_the_real_model(session: irkit.Session) -> None:
    panel = session.steering(prompt="I think dogs are", num_predict=12, live=False)
    held = session.cache.ids
    message = {"kind": "make", "name": "joy", "more": "I love this\nWhat a joy", "less": "I hate this", "layer": 14}
    panel._make(message)
    assert panel.problem == ""
    assert "I love this / What a joy − I hate this, layer 14" in panel.known["joy"]["about"]
    (edit,) = panel.edits
    assert (edit.layers, edit.strength, edit.positions) == (14, 1.0, None)
    set_vector(panel, "joy", strength=2.0, positions="answer")
    unedited, edited = answered(panel)
    assert unedited.text == session.respond("I think dogs are", num_predict=12, temperature=0).text
    assert edited.text != unedited.text
    assert held == ()
    twin = panel.twin()
    assert "+2 × joy at layer 14" in twin
    assert "the first token that differs" in twin
    assert "<script" not in twin
    panel._make({"kind": "make", "more": "a", "less": ""})
    assert "negative: there is no text" in panel.problem
    panel.close()
