"""Two formats of one small model against each other, and against numpy's own account of their traces."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import irkit
from irkit import analysis, families
from irkit.engine.runtime import Runtime
from irkit.errors import OptionError

PROMPTS = ["hello there, tiny model", "another"]
Open = Callable[..., irkit.Session]


@pytest.fixture(scope="module")
def opened(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens a small model of a format, exact, once; nothing is compiled ahead."""
    folder, held = tmp_path_factory.mktemp("formats"), {}

    def open_session(format_name: str = "F32", precision: str = "exact", **shape: int) -> irkit.Session:
        key = format_name, precision, *shape.items()
        if key not in held:
            path = folder / f"{format_name}{''.join(map(str, shape.values()))}.gguf"
            path = path if path.exists() else write_model(path, format_name, **shape)
            held[key] = irkit.Session(path, precision=precision)
        return held[key]

    with pytest.MonkeyPatch.context() as patched:
        for ahead in ("prepare", "_reader"):
            patched.setattr(Runtime, ahead, lambda *arguments, **options: None)
        yield open_session
    for session in held.values():
        session.close()


@pytest.fixture(scope="module")
def compared(opened: Open) -> analysis.Comparison:
    return irkit.compare(opened(), opened("Q8_0"), PROMPTS)


def lens(session: irkit.Session, streams: np.ndarray) -> np.ndarray:
    """Log-probabilities `[..., d_vocab]` of streams, in float64."""
    file, config = session.model.file, session.model.config
    weights = families.weights(file, config)
    norm, unembed = (families.read_weight(file, weights[name]) for name in ("ln_final", "unembed"))
    assert norm is not None
    assert unembed is not None
    x = streams.astype(np.float64)
    logits = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.eps) * norm @ unembed.T.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_against_numpy(opened: Open, compared: analysis.Comparison) -> None:
    sessions = opened(), opened("Q8_0")
    kl, cosine, drift, agree, said = [], [], [], [], []
    for prompt in PROMPTS:
        a, b = (session.trace(prompt, names=("resid_post", "pattern")) for session in sessions)
        x, y = a["resid_post"][:, 0].astype(float), b["resid_post"][:, 0].astype(float)
        p, q = lens(sessions[0], x), lens(sessions[1], y)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        cosine.append((x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1))
        drift.append(0.5 * np.abs(a["pattern"] - b["pattern"]).sum(-1)[:, 0])
        agree.append(p.argmax(-1) == q.argmax(-1))
        said.append((p, q))
        np.testing.assert_array_equal(agree[-1][-1], a.logits.argmax(-1)[0] == b.logits.argmax(-1)[0])
    np.testing.assert_allclose(compared.kl, np.concatenate(kl, 1).mean(1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(compared.cosine, np.concatenate(cosine, 1).mean(1), atol=1e-7)
    np.testing.assert_allclose(compared.drift, np.concatenate(drift, 2).mean(2), rtol=1e-3, atol=1e-7)
    assert compared.final_kl == compared.kl[-1] > 0
    assert compared.agreement == np.concatenate(agree, 1)[-1].mean()
    assert compared.positions == sum(each.shape[1] for each in agree)
    assert len(compared.disagreements) == sum(not each[-1].all() for each in agree)
    for each in compared.disagreements:
        p, q = said[each.prompt]
        position = int(np.flatnonzero(~agree[each.prompt][-1])[0])
        assert (each.position, each.layer) == (position, int(np.flatnonzero(~agree[each.prompt][:, position])[0]))
        show = sessions[0].model.tokenizer.token
        assert (each.a, each.b) == (show(p[-1, position].argmax()), show(q[-1, position].argmax()))
        found = each.a_probability, each.b_probability
        np.testing.assert_allclose(found, np.exp([p[-1, position].max(), q[-1, position].max()]), rtol=1e-4)


def test_a_session_against_itself(opened: Open) -> None:
    same = irkit.compare(opened(), opened(), PROMPTS)
    np.testing.assert_array_equal(same.kl, 0)
    np.testing.assert_array_equal(same.drift, 0)
    np.testing.assert_allclose(same.cosine, 1, atol=1e-15)
    assert same.agreement == 1
    assert same.disagreements == ()


def test_fewer_bits_are_further(opened: Open, compared: analysis.Comparison) -> None:
    further = irkit.compare(opened(), opened("Q4_0"), PROMPTS)
    assert (further.kl > 5 * compared.kl).all()
    assert (further.cosine < compared.cosine).all()
    assert (further.drift > compared.drift).all()
    assert further.agreement < 1
    assert further.disagreements


def test_layer_by_layer_and_fast(opened: Open, compared: analysis.Comparison) -> None:
    """Where memory is short, one layer at a time; and paths are opened, and closed again."""
    paths = [opened(name).model.path for name in ("F32", "Q8_0")]
    short = irkit.compare(paths[0], opened("Q8_0"), PROMPTS, limit=1, precision="exact")
    for name in ("kl", "cosine", "drift"):
        np.testing.assert_allclose(getattr(short, name), getattr(compared, name), rtol=1e-4, atol=1e-6)
    assert short.disagreements == compared.disagreements
    fast = irkit.compare(opened("Q8_0"), opened("Q8_0", "fast"), PROMPTS)
    assert 0 < fast.final_kl < 0.1
    assert ("exact" in fast.a, "fast" in fast.b, "Q8_0" in fast.b) == (True, True, True)


def test_as_text_table_and_figure(opened: Open) -> None:
    found = irkit.compare(opened(), opened("Q4_0"), PROMPTS)
    text = repr(found)
    lines = text.splitlines()
    assert lines[0] == f"F32.gguf (F32, exact) | Q4_0.gguf (Q4_0, exact): 2 prompts, {found.positions} positions"
    assert f"{found.final_kl:.3g} nats" in lines[1]
    assert str(found.disagreements[0]) in lines
    assert lines[-1].split()[:2] == ["1", f"{found.final_kl:.3g}"]
    frame = found.to_frame()
    assert list(frame.index) == [0, 1]
    np.testing.assert_array_equal(frame["drift"], found.drift.mean(1))
    np.testing.assert_array_equal(frame["largest_drift"], found.drift[[0, 1], frame["head"]])
    drawn = [axes.lines[0].get_ydata() for axes in found.plot().axes]
    for shown, values in zip(drawn, (found.kl, found.cosine, found.drift.mean(1)), strict=True):
        np.testing.assert_array_equal(shown, values)


def test_what_cannot_be_compared(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"d_mlp is 96 in .*F32.gguf, 64 in"):
        irkit.compare(opened(), opened(d_mlp=64), PROMPTS)
    with pytest.raises(OptionError, match="prompts: there is none"):
        irkit.compare(opened(), opened("Q8_0"), [])
    with pytest.raises(OptionError, match="precision: both sessions are open already"):
        irkit.compare(opened(), opened("Q8_0"), PROMPTS, precision="exact")
    other = opened("Q8_0").model
    with monkeypatch.context() as patched:
        real = other.tokenizer.token_bytes
        patched.setattr(other.tokenizer, "token_bytes", lambda token: b"?" if token == 7 else real(token))
        with pytest.raises(OptionError, match="not the same vocabulary: token 7 is"):
            irkit.compare(opened(), opened("Q8_0"), PROMPTS)
    monkeypatch.setattr(other.tokenizer, "encode", lambda text: [1, 2, 3])
    with pytest.raises(OptionError, match="not the same tokens: prompt 0 is"):
        irkit.compare(opened(), opened("Q8_0"), PROMPTS)
