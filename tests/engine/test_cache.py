"""The KV cache as an object: looked into, forked, rewound, gone on from, cut, saved."""

import json
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import irkit
from irkit.engine.cache import Cache
from irkit.errors import ContextFullError, ModelFileError, OptionError

PROMPT = list(range(40, 60))
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 6, "stop": (), "logit_bias": {257: -100.0}}
READ: dict[str, Any] = GREEDY | {"num_predict": 0}
SAMPLED: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def path(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cache") / "small.gguf")


@pytest.fixture(scope="module")
def small(path: Path) -> Iterator[irkit.Session]:
    with irkit.Session(path, precision="exact") as session:
        yield session


@pytest.fixture
def s(small: irkit.Session) -> irkit.Session:
    """A session that has read the prompt."""
    small.reset()
    read(small, PROMPT)
    return small


def read(session: irkit.Session, ids: list[int]) -> None:
    """Have exactly these in the cache."""
    session.generate(ids, **READ).finish_reason  # noqa: B018


def made(generation: irkit.results.Generation) -> list[tuple[int, float]]:
    return [(token.id, token.logprob or 0.0) for token in generation.tokens]


def content(cache: Any) -> np.ndarray:
    return np.stack([part(layer) for layer in range(cache.n_layers) for part in (cache.keys, cache.values)])


def steering(strength: float) -> irkit.Edit:
    return irkit.steer(np.random.default_rng(1).normal(size=64), 0, strength)


def test_what_a_view_shows(s: irkit.Session) -> None:
    view = s.cache
    assert (len(view), view.ids, view.provenance, view.capacity) == (20, tuple(PROMPT), "clean", 512)
    assert view.tokens == tuple(map(s.model.tokenizer.token, PROMPT))
    assert view.nbytes == 2 * 2 * 2 * 512 * 16 * 4 + 512 * 4
    trace = s.trace([PROMPT])
    for layer in (0, 1, -1):
        assert view.keys(layer).dtype == np.float32
        expected = trace["rot_k", layer][0].swapaxes(0, 1), trace["v", layer][0].swapaxes(0, 1)
        np.testing.assert_allclose(view.keys(layer), expected[0], atol=1e-5)
        np.testing.assert_allclose(view.values(layer), expected[1], atol=1e-5)
        np.testing.assert_array_equal(view.values(layer, 1), view.values(layer)[1])
    assert repr(view) == "<CacheView: 20 of 512 tokens, clean, 264 kB>"
    for wrong in (lambda: view.keys(2), lambda: view.values(0, 2)):
        with pytest.raises(OptionError, match="there is no 2"):
            wrong()
    s.reset()
    assert (len(view), view.nbytes, view.keys(0).shape) == (0, 0, (2, 0, 16))


def test_a_table_has_a_row_a_position(s: irkit.Session) -> None:
    frame = s.cache.to_frame(layer=1)
    assert frame["id"].tolist() == PROMPT
    np.testing.assert_allclose(frame["keys"], np.linalg.norm(s.cache.keys(1), axis=-1).mean(0), rtol=1e-6)
    assert not np.allclose(s.cache.to_frame()["keys"], frame["keys"])


def test_what_is_shown_is_a_copy(s: irkit.Session) -> None:
    before = s.cache.keys(0)
    s.cache.keys(0)[:] = 0
    np.testing.assert_array_equal(s.cache.keys(0), before)


def test_a_fork_run_again_gives_the_same_bits(s: irkit.Session) -> None:
    fork = s.cache.fork()
    first = made(s.continue_from(**SAMPLED))
    written = content(s.cache)
    s.cache = fork
    assert made(s.continue_from(**SAMPLED)) == first
    np.testing.assert_array_equal(content(s.cache), written)


def test_forks_go_their_own_ways(s: irkit.Session) -> None:
    fork, held = s.cache.fork(), content(s.cache)
    assert fork._cache.arrays is s._cache.arrays  # nothing was copied
    left, right = s.fork(), s.fork()
    answers = [made(each.continue_from(10, id, **GREEDY)) for each, id in ((left, 70), (right, 71), (s, 72))]
    assert len({json.dumps(answer) for answer in answers}) == 3
    np.testing.assert_array_equal(content(fork), held)
    for session, id in ((left, 70), (right, 71), (s, 72)):
        assert session.cache.ids[:11] == (*PROMPT[:10], id)
        np.testing.assert_array_equal(content(session.cache)[:, :, :10], held[:, :, :10])
    left.close()
    right.close()
    assert len(s.cache) == 16


def test_only_a_cache_that_is_shared_is_copied(s: irkit.Session) -> None:
    def shared() -> bool:
        return s.model.submit(lambda: s._cache.shared).result()

    fork = s.cache.fork()
    assert shared()
    del fork  # nobody looks at it any more
    assert not shared()
    fork = s.cache.fork()
    read(s, [*PROMPT, 7])
    assert not shared()
    assert not s.model.submit(lambda: fork._cache.shared).result()


def test_a_fork_grows_by_itself(path: Path) -> None:
    with irkit.Session(path, precision="exact", num_ctx=2048) as session:
        read(session, [50] * 505)
        fork, held = session.cache.fork(), content(session.cache)
        session.continue_from(None, [60] * 20, **GREEDY).text  # noqa: B018
        assert (session.cache.capacity, fork.capacity) == (1024, 512)
        np.testing.assert_array_equal(content(session.cache)[:, :, :505], held)
        with irkit.Session(path, precision="exact", num_ctx=520) as narrow:
            with pytest.raises(ContextFullError, match="530 tokens; the context holds 520"):
                narrow.cache = session.cache
            session.cache.rewind(20)
            narrow.cache = session.cache  # more memory than its context needs
            answer = narrow.continue_from(num_predict=-1, temperature=0, logit_bias={257: -100.0})
            assert (answer.finish_reason, len(answer.tokens)) == ("context", 10)


def test_only_a_cache_of_the_same_model_is_taken(s: irkit.Session, path: Path) -> None:
    for wrong in (None, Cache(512)):
        with pytest.raises(OptionError, match="a fork of a cache is needed"):
            setattr(s, "cache", wrong)  # noqa: B010
    with (
        irkit.Session(path, precision="exact", cache_type="f16") as other,
        pytest.raises(OptionError, match="other options"),
    ):
        other.cache = s.cache
    with pytest.raises(OptionError, match="closed"):
        other.cache  # noqa: B018


def test_rewound_and_made_again_is_as_fresh(s: irkit.Session) -> None:
    first = made(s.continue_from(**GREEDY))
    s.cache.rewind(5)
    assert s.cache.ids == tuple(PROMPT)
    again = s.generate(PROMPT, **GREEDY)
    assert made(again) == first
    assert again.stats.cached_tokens == 19
    for wrong in (-1, 100):
        with pytest.raises(OptionError, match=f"rewind: {wrong} "):
            s.cache.rewind(wrong)
    assert len(s.cache) == 25
    s.cache.rewind(25)
    assert (len(s.cache), s.cache.provenance) == (0, "clean")


@pytest.mark.parametrize(("index", "alternative"), [(7, 90), (-3, "he is"), (0, [80, 81]), (20, "o"), (None, "x")])
def test_going_on_is_as_the_whole_text(s: irkit.Session, index: int | None, alternative: Any) -> None:
    fork = s.cache.fork()
    new = s.tokenize(alternative) if isinstance(alternative, str) else np.atleast_1d(alternative).tolist()
    kept = PROMPT[:index]
    branch = s.continue_from(index, alternative, **GREEDY)
    tokens = made(branch)
    assert branch.stats.cached_tokens == len(kept)
    assert s.cache.ids[: len(kept) + len(new)] == (*kept, *new)
    s.reset()
    fresh = s.generate([*kept, *new], **GREEDY)
    assert [id for id, _ in made(fresh)] == [id for id, _ in tokens]
    np.testing.assert_allclose([p for _, p in made(fresh)], [p for _, p in tokens], atol=2e-5)
    assert fork.ids == tuple(PROMPT)


def test_going_on_says_what_it_cannot(s: irkit.Session) -> None:
    for wrong, message in [((21, 5), "no 21"), ((-21, 5), "no -21"), ((3, 300), "300 is outside"), (("x",), "token_i")]:
        with pytest.raises(OptionError, match=message):
            s.continue_from(*wrong)
    with pytest.raises(ContextFullError):
        s.continue_from(None, [5] * 500)
    with pytest.raises(OptionError, match="the prompt is empty"):
        s.continue_from(0)
    s.reset()
    with pytest.raises(OptionError, match="the cache is empty"):
        s.continue_from(None, 5)


def test_going_on_with_edits_leaves_nothing_for_a_clean_run(s: irkit.Session) -> None:
    plain = made(s.continue_from(10, 70, **GREEDY))
    zero = s.continue_from(10, 70, edits=[steering(0)], capture="resid_post", **GREEDY)
    assert [id for id, _ in made(zero)] == [id for id, _ in plain]
    steered = s.continue_from(10, 70, edits=[steering(20)], **GREEDY)
    assert steered.stats.cached_tokens == 10
    assert made(steered) != plain
    assert s.cache.provenance == "edited"
    edited = s.generate([*PROMPT[:10], 70], edits=[steering(20)], **GREEDY)
    assert edited.stats.cached_tokens == 0  # the tokens before were read without
    assert s.cache.provenance == "edited"
    assert s.continue_from(**GREEDY).stats.cached_tokens > 0
    clean = s.generate([*PROMPT[:10], 70], **GREEDY)
    assert clean.stats.cached_tokens == 0
    assert [id for id, _ in made(clean)] == [id for id, _ in plain]
    assert zero.tokens[0].captures["resid_post", 1].shape == (1, 1, 64)


def test_what_was_read_before_going_on_with_edits_stays_clean(s: irkit.Session) -> None:
    plain = made(s.continue_from(10, 70, **GREEDY))
    s.continue_from(10, 70, edits=[steering(20)], **GREEDY).text  # noqa: B018
    edited = s.cache.fork()
    clean = s.generate([*PROMPT[:10], 70], **GREEDY)
    assert (clean.stats.cached_tokens, s.cache.provenance) == (10, "clean")
    assert made(clean) == plain
    assert edited.provenance == "edited"
    edited.rewind(len(edited) - 10)
    assert edited.provenance == "clean"
    s.cache = edited
    assert made(s.continue_from(None, 70, **GREEDY)) == plain


def turned(keys: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Keys `[kv_head, position, 16]` turned by as many positions: complex numbers, in float64."""
    numbers = keys[..., :8].astype(np.float64) + 1j * keys[..., 8:]
    numbers = numbers * np.exp(1j * by[:, None] * 10000.0 ** (-np.arange(8) / 8))
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


@pytest.mark.parametrize("positions", [3, [0, 1, -2], slice(4, 12), [5, 5, 17]])
def test_dropping_turns_the_keys_behind(s: irkit.Session, positions: Any) -> None:
    left = np.delete(np.arange(20), positions)
    before, fork = [(s.cache.keys(i), s.cache.values(i)) for i in range(2)], s.cache.fork()
    s.cache.drop(positions)
    assert s.cache.ids == tuple(PROMPT[i] for i in left)
    for layer, (keys, values) in enumerate(before):
        found = s.cache.keys(layer)
        np.testing.assert_allclose(found, turned(keys[:, left], np.arange(len(left)) - left), atol=2e-5)
        same = left == np.arange(len(left))
        np.testing.assert_array_equal(found[:, same], keys[:, left][:, same])
        np.testing.assert_array_equal(s.cache.values(layer), values[:, left])
        np.testing.assert_array_equal(fork.keys(layer), keys)
    assert s.model.submit(lambda: np.asarray(s._cache.arrays.tokens)[0, : len(left)].tolist()).result() == list(  # pyright: ignore[reportOptionalMemberAccess]
        s.cache.ids
    )


def test_keys_of_the_first_layer_are_those_of_the_text_without(s: irkit.Session) -> None:
    s.cache.drop(slice(4, 9))
    keys = s.cache.keys(0)  # they see no other token
    read(s, PROMPT[:4] + PROMPT[9:])
    np.testing.assert_allclose(keys, s.cache.keys(0), atol=2e-5)


def test_dropping_the_end_is_rewinding(s: irkit.Session) -> None:
    held = content(s.cache)
    s.cache.drop(slice(-5, None))
    assert (s.cache.ids, s.cache.provenance) == (tuple(PROMPT[:15]), "clean")
    np.testing.assert_array_equal(content(s.cache), held[:, :, :15])
    with pytest.raises(OptionError, match="positions: there is no 15"):
        s.cache.drop([2, 15])


def test_only_going_on_uses_what_was_dropped_from(s: irkit.Session) -> None:
    s.cache.drop([3, 4])
    assert s.cache.provenance == "dropped"
    answer = s.continue_from(**GREEDY)
    assert (answer.stats.cached_tokens, s.cache.provenance) == (17, "dropped")
    s.continue_from(edits=[steering(3)], **GREEDY).text  # noqa: B018
    assert s.cache.provenance == "dropped and edited"
    fork = s.cache.fork()
    again = s.generate(list(fork.ids), **GREEDY)
    assert again.stats.cached_tokens == 3  # those before the dropped ones
    assert (s.cache.provenance, fork.provenance) == ("clean", "dropped and edited")
    s.reset()
    alone = s.generate(list(fork.ids), **GREEDY)
    assert [token.id for token in alone.tokens] == [token.id for token in again.tokens]
    np.testing.assert_allclose(
        [logprob for _, logprob in made(alone)], [logprob for _, logprob in made(again)], atol=1e-5
    )


def test_saved_and_loaded_is_the_same(s: irkit.Session, path: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    s.cache.save(file)
    held, answer = content(s.cache), made(s.continue_from(**SAMPLED))
    assert [each.name for each in tmp_path.iterdir()] == ["kept.safetensors"]
    with irkit.Session(path, precision="exact") as other:
        other.cache.load(file)
        np.testing.assert_array_equal(content(other.cache), held)
        assert (other.cache.ids, other.cache.provenance) == (tuple(PROMPT), "clean")
        again = other.generate(PROMPT, **SAMPLED)
        assert (made(again), again.stats.cached_tokens) == (answer, 19)
    s.cache.drop(0)
    s.cache.save(file)
    s.cache.load(file)
    assert s.cache.provenance == "dropped"
    assert s.generate(list(s.cache.ids), **GREEDY).stats.cached_tokens == 0


def test_what_is_not_of_this_model_is_refused(
    s: irkit.Session, path: Path, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "kept.safetensors"
    s.cache.save(file)
    other_model = write_model(tmp_path / "other.gguf", "F16")
    for options, message in [
        ({"model": other_model}, "another sha256"),
        ({"model": path, "precision": "fast"}, "fast"),
        ({"model": path, "cache_type": "f16"}, "float16"),
    ]:
        with (
            irkit.Session(**{"precision": "exact", **options}) as other,
            pytest.raises(ModelFileError, match=message),
        ):
            other.cache.load(file)
    with irkit.Session(path, precision="exact", num_ctx=12) as narrow, pytest.raises(ContextFullError):
        narrow.cache.load(file)
    with pytest.raises(OptionError, match="cannot be written"):
        s.cache.save(tmp_path / "no" / "folder")
    with pytest.raises(ModelFileError, match="no KV cache"):
        s.cache.load(tmp_path / "missing")
    s.reset()
    with pytest.raises(OptionError, match="the cache is empty"):
        s.cache.save(file)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_refused_and_changes_nothing(
    small: irkit.Session, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    if len(small.cache) != 20:
        small.reset()
        read(small, PROMPT)
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    small.cache.save(file)
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    other = data.draw(st.integers(1, 255))
    file.write_bytes(whole[:place] if cut else whole[:place] + bytes([whole[place] ^ other]) + whole[place + 1 :])
    try:
        small.cache.load(file)
    except (ModelFileError, ContextFullError):
        pass
    else:  # a letter in the model's name, a space between two fields
        assert not cut
        assert place < 8 + struct.unpack("<Q", whole[:8])[0]
    assert small.cache.ids == tuple(PROMPT)


def test_a_header_that_promises_more_than_there_is(s: irkit.Session, tmp_path: Path) -> None:
    file = tmp_path / "lies.safetensors"
    s.cache.save(file)
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    for length, message in [(1 << 40, "no KV cache"), (10, "no KV cache")]:
        for name, shape in {"keys": [2, 2, length, 16], "values": [2, 2, length, 16], "ids": [length]}.items():
            header[name]["shape"] = shape
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        with pytest.raises(ModelFileError, match=message):
            s.cache.load(file)


def test_threads_may_share_a_session(s: irkit.Session) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for _ in range(5):
                fork = s.cache.fork()
                s.continue_from(5, 60 + seed, **GREEDY).text  # noqa: B018
                s.cache = fork
                assert len(content(fork)) == 4
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    read(s, PROMPT)
    s.cache.rewind(len(s.cache) - 5)
    held = content(s.cache)
    s.reset()
    read(s, PROMPT[:5])
    np.testing.assert_allclose(content(s.cache), held, atol=1e-5)


def test_half_precision_is_kept_to_the_bit(session: irkit.Session, tmp_path: Path) -> None:
    session.generate("The capital of France is", temperature=0, num_predict=3).text  # noqa: B018
    held = content(session.cache)
    session.cache.save(tmp_path / "kept")
    answer = made(session.continue_from(3, " Spain is", temperature=0, num_predict=3))
    session.cache.load(tmp_path / "kept")
    np.testing.assert_array_equal(content(session.cache), held)
    assert made(session.continue_from(3, " Spain is", temperature=0, num_predict=3)) == answer
    dtypes = session.model.submit(lambda: {str(layer.dtype) for layer in session._cache.arrays.keys}).result()  # pyright: ignore[reportOptionalMemberAccess]
    assert dtypes == {str(session.model.load().result().cache_dtype)}


def test_another_capital(session: irkit.Session) -> None:
    session.generate("The capital of France is", temperature=0, num_predict=3).text  # noqa: B018
    before = session.cache.fork()
    answer = session.continue_from(3, " Italy is", temperature=0, num_predict=3)
    assert "Rome" in answer.text
    assert answer.stats.cached_tokens == 3
    assert session.cache.tokens[:5] == ("The", " capital", " of", " Italy", " is")
    session.cache = before
    assert "".join(before.tokens).startswith("The capital of France is Paris")
    assert session.generate("The capital of France is", temperature=0, num_predict=3).stats.cached_tokens == 4
