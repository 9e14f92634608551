"""Captures and edits through the session: what they show, what they change, and what they leave alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import irkit
from irkit.engine import programs
from irkit.engine import runtime as runtime_module
from irkit.errors import BudgetError, ContextFullError, OptionError
from irkit.transformer.taps import HOOK_POINTS, hook_names

TEXTS = ["an ode to hooks", "the cache", "so it goes, and on"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module", params=["exact", "fast"])
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Iterator[irkit.Session]:
    """Two layers, four heads; what the kernels can fuse."""
    path = write_model(tmp_path_factory.mktemp("models") / "small.gguf", "F32", biases=True)
    with irkit.Session(path, backend="cpu", precision=request.param, cache_type="f32") as session:
        yield session


@pytest.fixture(scope="module")
def whole(small: irkit.Session) -> irkit.Trace:
    """Everything about one text."""
    return small.trace(TEXTS[0], names=[point.name for point in HOOK_POINTS])


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs compiled or loaded from now on, by the names of their functions."""
    made: list[str] = []

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        made.append(function.__name__)
        return programs.load_or_compile(function, *arguments, **options)

    monkeypatch.setattr(runtime_module, "load_or_compile", counted)
    return made


def test_every_hook_point_is_held_by_every_name(small: irkit.Session, whole: irkit.Trace) -> None:
    assert set(whole) == set(hook_names(2))
    n = len(whole.ids[0])
    assert whole.tokens == tuple(TEXTS[0].replace(" ", "Ġ")) or len(whole.tokens) == n
    pattern = whole["blocks.1.attn.hook_pattern"]
    for name in [("pattern", 1), ("pattern", -1), ("attn.hook_pattern", 1)]:
        np.testing.assert_array_equal(whole[name], pattern)
    np.testing.assert_array_equal(whole["pattern"][1], pattern)
    np.testing.assert_array_equal(whole["scale", 0, "ln2"], whole["ln2.scale", 0])
    assert pattern.shape == (1, 4, n, n)
    assert whole["result", 0].shape == (1, n, 4, 64)
    assert whole.logits.shape == (1, n, 258)
    assert "pattern" in whole
    assert ("pattern", 2) not in whole
    for absent in [("pattern", 2), "nothing", ("nothing", 0), "normalized"]:
        with pytest.raises(KeyError):
            whole[absent]


def test_identities_of_a_trace(whole: irkit.Trace) -> None:
    assert np.array_equal(np.triu(whole["pattern"][:, 0, 0], 1), np.zeros_like(whole["pattern"][:, 0, 0]))
    np.testing.assert_allclose(whole["pattern"].sum(-1), 1, **CLOSE)
    np.testing.assert_allclose(whole["resid_mid"], whole["resid_pre"] + whole["attn_out"], **CLOSE)
    np.testing.assert_allclose(whole["resid_post"], whole["resid_mid"] + whole["mlp_out"], **CLOSE)
    np.testing.assert_allclose(whole["resid_pre", 1], whole["resid_post", 0], **CLOSE)
    np.testing.assert_allclose(whole["embed"], whole["resid_pre", 0], **CLOSE)
    scores = whole["attn_scores", 1]
    softmax = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(whole["pattern", 1], softmax / softmax.sum(-1, keepdims=True), **CLOSE)


def test_a_batch_shows_what_its_texts_show_alone(small: irkit.Session) -> None:
    names = ["pattern", "resid_post", "k", "ln_final.normalized"]
    together = small.trace(TEXTS, names=names)
    for index, text in enumerate(TEXTS):
        alone, row = small.trace(text, names=names), together.row(index)
        assert row.ids == alone.ids
        assert row.strings == alone.strings
        for name in alone:
            np.testing.assert_allclose(row[name], alone[name], err_msg=name, **CLOSE)
        np.testing.assert_allclose(row.logits, alone.logits, **CLOSE)


def test_a_long_text_is_read_in_several_calls(small: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [i * 7 % 250 for i in range(50)]
    kept: dict[str, Any] = {"names": ["pattern", "resid_post", "z"]}
    cases = [{}, {"reduce": "last"}, {"reduce": "mean"}, {"reduce": "norm"}, {"positions": [3, 40, -1]}, {"layers": 1}]
    whole = [small.trace(ids, **kept, **case) for case in cases]
    monkeypatch.setattr("irkit.engine.trace.CHUNKS", (8, 16))
    for case, expected in zip(cases, whole, strict=True):
        found = small.trace(ids, **kept, **case)
        assert set(found) == set(expected)
        for name in found:
            np.testing.assert_allclose(found[name], expected[name], err_msg=f"{case} {name}", **CLOSE)
        np.testing.assert_allclose(found.logits, expected.logits, **CLOSE)
        assert small.estimate(ids, **kept, **case).nbytes == found.nbytes


def test_reducers(small: irkit.Session, whole: irkit.Trace) -> None:
    def kept(name: str, reduce: str, **more: Any) -> Any:
        return small.trace(TEXTS[0], names=name, reduce=reduce, logits="none", **more)[name, 1]

    pattern, resid = whole["pattern", 1], whole["resid_post", 1]
    np.testing.assert_allclose(kept("resid_post", "last"), resid[:, -1:], **CLOSE)
    np.testing.assert_allclose(kept("pattern", "mean"), pattern.mean(2, keepdims=True), **CLOSE)
    np.testing.assert_allclose(kept("resid_post", "norm"), np.linalg.norm(resid, axis=-1), **CLOSE)
    entropy = -(pattern * np.log(np.where(pattern > 0, pattern, 1))).sum(-1)
    np.testing.assert_allclose(kept("pattern", "entropy"), entropy, **CLOSE)
    top = kept("resid_post", "top_k", k=3)
    np.testing.assert_allclose(top.values, -np.sort(-resid)[..., :3], **CLOSE)
    np.testing.assert_allclose(np.take_along_axis(resid, top.indices, -1), top.values, **CLOSE)
    lens = kept("resid_post", "lens", k=4)
    logprobs = whole.logits - np.log(np.exp(whole.logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(lens.values, -np.sort(-logprobs)[..., :4], **CLOSE)
    np.testing.assert_array_equal(lens.indices[..., 0], logprobs.argmax(-1))
    few = small.trace(TEXTS[0], names=["pattern", "z"], heads=[3, 0], positions=[-1, 2], layers=1)
    np.testing.assert_allclose(few["pattern", 1], pattern[:, [3, 0]][:, :, [-1, 2]], **CLOSE)
    np.testing.assert_allclose(few["z", 1], whole["z", 1][:, [-1, 2]][:, :, [3, 0]], **CLOSE)
    chosen_mean = small.trace(TEXTS[0], names="resid_post", positions=[1, 2], reduce="mean")["resid_post", 0]
    np.testing.assert_allclose(chosen_mean, whole["resid_post", 0][:, 1:3].mean(1, keepdims=True), **CLOSE)


def test_decoding_shows_what_reading_shows(small: irkit.Session) -> None:
    names = ["pattern", "resid_post", "z", "k", "embed", "mlp_out"]
    generation = small.generate(TEXTS[0], num_predict=5, temperature=0, capture=names).wait()
    ids = [*small.tokenize(TEXTS[0]), *(token.id for token in generation.tokens)]
    read = small.trace(ids, names=names)
    for index, token in enumerate(generation.tokens):
        at = len(ids) - len(generation.tokens) + index - 1  # the position whose pass made it
        assert token.captures.ids == ((ids[at],),)
        assert token.captures.provenance.positions == (at,)
        for name in token.captures:
            found, expected = token.captures[name], read[name]
            if "pattern" in name:
                np.testing.assert_allclose(found, expected[:, :, at : at + 1, : at + 1], err_msg=name, **CLOSE)
            else:
                np.testing.assert_allclose(found, expected[:, at : at + 1], err_msg=name, **CLOSE)


def test_a_lens_in_decoding_waits_until_it_is_looked_through(small: irkit.Session) -> None:
    lens = {"names": "resid_post", "reduce": "lens", "k": 4}
    generation = small.generate(TEXTS[0], num_predict=3, temperature=0, capture=lens | {"layers": [1]}).wait()
    both = small.generate(TEXTS[0], num_predict=3, temperature=0, capture=lens).wait()
    ids = [*small.tokenize(TEXTS[0]), *(token.id for token in generation.tokens)]
    read = small.trace(ids, **lens)
    for index, (token, other) in enumerate(zip(generation.tokens, both.tokens, strict=True)):
        at = len(ids) - 4 + index
        assert token.captures is not None
        assert other.captures is not None
        assert dict(token.captures.provenance.reduce) == {"hook_resid_post": "lens"}
        for found in (token.captures["resid_post", 1], other.captures["resid_post", 1]):
            np.testing.assert_allclose(found.values, read["resid_post", 1].values[:, [at]], **CLOSE)
            np.testing.assert_array_equal(found.indices, read["resid_post", 1].indices[:, [at]])
        np.testing.assert_allclose(
            other.captures["resid_post", 0].values, read["resid_post", 0].values[:, [at]], **CLOSE
        )


def test_a_reused_prefix_neither_misaligns_nor_lacks_captures(small: irkit.Session) -> None:
    small.reset()
    options: dict[str, Any] = {"num_predict": 3, "temperature": 0, "capture": "pattern"}
    first = small.generate(TEXTS[0], **options).wait()
    again = small.generate(TEXTS[0], **options).wait()
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    for one, other in zip(first.tokens, again.tokens, strict=True):
        np.testing.assert_allclose(one.captures["pattern"], other.captures["pattern"], **CLOSE)


@pytest.mark.parametrize("capture", ["pattern", "z", "resid_post", {"names": "pattern", "layers": 1}])
def test_capturing_leaves_the_answer_alone(small: irkit.Session, capture: Any) -> None:
    options: dict[str, Any] = {"num_predict": 12, "temperature": 1.5, "seed": 4}
    small.reset()
    plain = small.generate(TEXTS[0], **options).wait()
    small.reset()
    seen = small.generate(TEXTS[0], capture=capture, **options).wait()
    assert [token.id for token in seen.tokens] == [token.id for token in plain.tokens]
    np.testing.assert_allclose(
        [token.logprob or 0 for token in seen.tokens], [token.logprob or 0 for token in plain.tokens], **CLOSE
    )


def test_edits_do_what_they_say(small: irkit.Session, whole: irkit.Trace) -> None:
    everything = [point.name for point in HOOK_POINTS if point.name != "attn.hook_result"]

    def edited(*edits: irkit.Edit) -> irkit.Trace:
        return small.trace(TEXTS[0], names=everything, edits=edits)

    vector = np.linspace(-1, 1, 64).astype(np.float32)
    steered = edited(irkit.steer(vector, layers=0, strength=2.0, positions=slice(3, 6)))
    difference = steered["resid_post", 0] - whole["resid_post", 0]
    np.testing.assert_allclose(difference[0, 3:6], np.tile(2 * vector, (3, 1)), atol=1e-4)
    np.testing.assert_allclose(difference[0, :3], 0, atol=1e-5)
    np.testing.assert_allclose(difference[0, 6:], 0, atol=1e-5)
    np.testing.assert_allclose(steered.logits[:, :3], whole.logits[:, :3], **CLOSE)  # nothing before it sees it
    assert np.abs(steered.logits[:, 6:] - whole.logits[:, 6:]).max() > 1e-3

    without = edited(irkit.ablate("z", layers=1, heads=[0, 2]))
    assert not without["z", 1][:, :, [0, 2]].any()
    np.testing.assert_allclose(without["z", 1][:, :, [1, 3]], whole["z", 1][:, :, [1, 3]], **CLOSE)
    mean = whole["mlp_out", 0].mean((0, 1))
    np.testing.assert_allclose(edited(irkit.ablate("mlp_out", 0, mean=mean))["mlp_out", 0][0, 4], mean, **CLOSE)
    scaled = edited(irkit.scale("attn_out", 0.5, layers=1, positions=-1))
    np.testing.assert_allclose(scaled["attn_out", 1][:, -1], 0.5 * whole["attn_out", 1][:, -1], **CLOSE)
    both = edited(irkit.scale("attn_out", 0.5, layers=1), irkit.scale("attn_out", 0.5, layers=1))
    np.testing.assert_allclose(both["attn_out", 1], 0.25 * whole["attn_out", 1], **CLOSE)


def test_what_changes_nothing_changes_nothing(small: irkit.Session, whole: irkit.Trace) -> None:
    nothing = [
        irkit.steer(np.ones(64), layers=None, strength=0.0),
        irkit.scale("mlp_out", 1.0),
        irkit.patch(whole, "resid_mid", 1),
        irkit.patch(whole, "pattern", 0),
        irkit.call("blocks.0.hook_resid_post", lambda value, hook: None),
    ]
    for edit in nothing:
        found = small.trace(TEXTS[0], names=(), edits=[edit])
        np.testing.assert_allclose(found.logits, whole.logits, err_msg=repr(edit), **CLOSE)


def test_patching_all_of_another_text_gives_its_logits(small: irkit.Session) -> None:
    clean = small.trace("one two three", names=["resid_pre"])
    corrupt = small.trace("six two three", names=(), edits=[irkit.patch(clean, "resid_pre", 0)])
    np.testing.assert_allclose(corrupt.logits[:, 3:], clean.logits[:, 3:], **CLOSE)
    part = small.trace("six two three", names=(), edits=[irkit.patch(clean, "resid_pre", 0, positions=[0, 1])])
    assert np.abs(part.logits - clean.logits).max() > 1e-3


def test_edits_hold_in_decoding_and_leave_no_trace(small: irkit.Session) -> None:
    options: dict[str, Any] = {"num_predict": 8, "temperature": 0}
    small.reset()
    clean = small.generate(TEXTS[0], **options).wait()
    edits = [irkit.steer(np.linspace(-4, 4, 64), layers=0, strength=3.0), irkit.ablate("z", layers=1, heads=1)]
    steered = small.generate(TEXTS[0], edits=edits, **options).wait()
    assert steered.stats.cached_tokens == 0  # what the clean run left is not what this one would have
    ids = [*small.tokenize(TEXTS[0]), *(token.id for token in steered.tokens)]
    read = small.trace(ids, names=(), edits=edits).logits[0]
    start = len(ids) - len(steered.tokens) - 1
    logprobs = read - np.log(np.exp(read).sum(-1, keepdims=True))
    expected = [logprobs[start + i, token.id] for i, token in enumerate(steered.tokens)]
    np.testing.assert_allclose([token.logprob or 0 for token in steered.tokens], expected, atol=2e-3)
    after = small.generate(TEXTS[0], **options).wait()
    assert after.stats.cached_tokens == 0
    assert after.text == clean.text
    with small.hooks(edits=edits):
        assert small.generate(TEXTS[0], **options).text == steered.text
        within = small.score(TEXTS[0]).total
    assert small.score(TEXTS[0]).total != pytest.approx(within)
    assert small.generate(TEXTS[0], **options).text == clean.text


def test_hooks_in_the_words_of_transformer_lens(small: irkit.Session, whole: irkit.Trace) -> None:
    logits, cache = small.run_with_cache(TEXTS[0], names_filter=lambda name: name.endswith("hook_z"), pos_slice=-1)
    assert logits.shape == (1, len(whole.ids[0]), 258)
    assert set(cache) == {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z"}
    np.testing.assert_allclose(cache["z", 1], whole["z", 1][:, -1:], **CLOSE)
    seen = []

    def first_head_out(value: Any, hook: Any) -> Any:
        seen.append((hook.name, hook.layer, hook.point.name))
        return value.at[:, :, 0].set(0)

    hooked = small.run_with_hooks(TEXTS[0], fwd_hooks=[("blocks.1.attn.hook_z", first_head_out)])
    ablated = small.trace(TEXTS[0], names=(), edits=[irkit.ablate("z", layers=1, heads=0)]).logits
    np.testing.assert_allclose(hooked, ablated, **CLOSE)
    assert set(seen) == {("blocks.1.attn.hook_z", 1, "attn.hook_z")}
    doubled = small.run_with_hooks(TEXTS[0], fwd_hooks=[(lambda name: "mlp_out" in name, lambda v, hook: 2 * v)])
    np.testing.assert_allclose(doubled, small.trace(TEXTS[0], edits=[irkit.scale("mlp_out", 2)]).logits, **CLOSE)
    with pytest.raises(OptionError, match=r"hook on blocks\.0\.hook_mlp_out returned shape"):
        small.run_with_hooks(TEXTS[0], fwd_hooks=[("blocks.0.hook_mlp_out", lambda v, hook: v[:, :1])])
    with pytest.raises(OptionError, match=r"blocks\.0\.hook_mlp_out"):
        small.run_with_hooks(TEXTS[0], fwd_hooks=[("blocks.0.hook_mlp_out", lambda v, hook: jnp.zeros(3) + v["x"])])


def test_other_choices_compile_nothing(small: irkit.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_predict": 3, "temperature": 0}

    def once(strength: float, layer: int, head: int) -> None:
        edits = [irkit.steer(np.full(64, strength), layer, strength, positions=layer), irkit.ablate("z", layer, head)]
        edits += [irkit.scale("z", np.full((2, 4), strength)), irkit.scale("mlp_out", [strength, 1])]
        small.trace(TEXTS[0], names=["pattern", "z"], layers=layer, heads=head, positions=[layer, -1], edits=edits)
        small.generate(TEXTS[0], edits=edits, capture={"names": "pattern", "layers": layer}, **options).wait()

    once(1.0, 0, 0)
    made = compiled(monkeypatch)
    for setting in range(20):
        once(setting / 3, setting % 2, setting % 4)
    assert made == []
    once_more = irkit.scale("mlp_out", 2.0)
    small.trace(TEXTS[0], names=["pattern"], edits=[once_more])
    assert made == ["trace"]  # the count can tell


def test_factors_by_layer_and_head_are_those_one_by_one(small: irkit.Session) -> None:
    factors = np.ones((2, 4), np.float32)
    factors[0, 1], factors[1, 3], factors[1, 0] = 0, 0.5, 2
    one_by_one = [irkit.scale("z", factors[at], layers=at[0], heads=at[1]) for at in ((0, 1), (1, 3), (1, 0))]
    one_by_one += [irkit.scale("mlp_out", 0.25, layers=1), irkit.scale("attn_out", 3, layers=0)]
    together = [irkit.scale("z", factors), irkit.scale("mlp_out", [1, 0.25]), irkit.scale("attn_out", [3, 1])]
    expected, found = (small.trace(TEXTS[0], names=(), edits=edits).logits for edits in (one_by_one, together))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - small.trace(TEXTS[0], names=()).logits).max() > 0.1
    as_json = [{"op": "scale", "name": "z", "factor": factors.tolist()}, *together[1:]]
    np.testing.assert_array_equal(small.trace(TEXTS[0], names=(), edits=as_json).logits, expected)
    assert "changed=3" in repr(together[0])


def test_a_budget_is_kept(small: irkit.Session) -> None:
    estimate = small.estimate(TEXTS, names=None)
    trace = small.trace(TEXTS, names=None)
    assert estimate.nbytes == trace.nbytes == sum(estimate.by_name.values())
    assert estimate.fits
    assert "in all, within the budget" in str(estimate)
    with pytest.raises(BudgetError, match=r"would hold .* the budget is 1 kB .* 8 tokens would fit|reducer"):
        small.trace(TEXTS, names=None, budget=1000)
    generation = small.generate(TEXTS[0], num_predict=6, temperature=0, capture={"names": "z", "budget": 1200})
    first, *_, last = generation.tokens
    assert last.captures["z"].shape == (2, 1, 1, 4, 16)
    with pytest.raises(BudgetError, match="were let go"):
        first.captures["z"]
    with pytest.raises(BudgetError, match="one token captures"):
        small.generate(TEXTS[0], num_predict=6, capture={"names": "z", "budget": 50}).wait()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"names": "patern"}, "no hook point 'patern'"),
        ({"names": "blocks.2.hook_resid_post"}, "no layer 2"),
        ({"names": "z", "layers": 2}, "layers: there is no 2"),
        ({"names": "z", "heads": [-5]}, "heads: there is no -5"),
        ({"names": "z", "positions": 99}, "positions: there is no 99"),
        ({"names": "z", "layers": []}, "none is chosen"),
        ({"names": "z", "reduce": "entropy"}, "entropy is of probabilities"),
        ({"names": "z", "reduce": "lens"}, "a lens looks at the residual stream"),
        ({"names": "z", "edits": [irkit.steer(np.ones(63), 0)]}, "63"),
        ({"names": "z", "edits": [irkit.steer(np.full(64, np.nan), 0)]}, "not finite"),
        ({"names": "z", "edits": [irkit.ablate("mlp_out", 0, heads=1)]}, "has no heads"),
        ({"names": "z", "edits": [irkit.scale("z", np.ones((2, 3)))]}, r"\[2\] or \[2, 4\] would"),
        ({"names": "z", "edits": [irkit.scale("mlp_out", [1, np.inf])]}, "not finite"),
        ({"names": "z", "edits": [irkit.scale("hook_embed", [1.0, 2.0])]}, "a number would"),
        ({"names": "z", "edits": [{"op": "stear"}]}, "steer, scale, ablate"),
    ],
)
def test_what_is_not_there_is_named(small: irkit.Session, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        small.trace(TEXTS[0], **asked)


def test_a_text_that_does_not_fit_is_refused(small: irkit.Session) -> None:
    with pytest.raises(ContextFullError):
        small.trace([1] * 513)
    with pytest.raises(OptionError, match="there is none"):
        small.trace([])
