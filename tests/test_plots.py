"""Figures: drawn without a display, with the numbers and the tokens they are of."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from irkit import plots
from irkit.errors import OptionError
from irkit.results import Alternative, Generation, Score, Stats, Token
from irkit.trace import Largest, Provenance, Trace

RNG = np.random.default_rng(0)
TOKENS = ("<s>", " The", " $x", "\n", "extraordinarily", "$", "\u200f", "中")
LABELS = ["<s>", "·The", "·$x", "↵", "extraordina…", "$", "\\u200f", "\\u4e2d"]
T, HEADS = len(TOKENS), 3


def trace(held: int = HEADS, **source: Any) -> Trace:
    """Causal patterns of layers 1 and 3 of four."""
    scores = np.where(np.tri(T) > 0, RNG.normal(size=(2, 1, held, T, T)), -np.inf)
    patterns = (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).astype(np.float32)
    values = {
        f"blocks.{layer}.attn.hook_pattern": (lambda value=value: value)
        for layer, value in zip((1, 3), patterns, strict=True)
    }
    return Trace([range(T)], [TOKENS], values, lambda: None, Provenance("small", "", "exact", **source), 4, 99)


def ticks(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def drawn(figure: Figure) -> bytes:
    """The figure as PNG, which a notebook would show."""
    shown = figure._repr_png_()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown.startswith(b"\x89PNG")
    assert len(shown) > 2000
    return shown


def image(axes: Any) -> Any:
    """What the first image of `axes` shows, masked where it is masked."""
    return axes.images[0].get_array()


@pytest.mark.filterwarnings("error")
def test_attention_of_a_head() -> None:
    made = trace()
    figure = made.plot(layer=-1, head=2)
    axes = figure.axes[0]
    shown = image(axes)
    np.testing.assert_array_equal(np.ma.getdata(shown), made["pattern", 3][0, 2])
    np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.triu(np.ones((T, T), bool), 1))
    assert ticks(axes.xaxis) == ticks(axes.yaxis) == LABELS
    assert axes.get_title() == "Attention, layer 3, head 2"
    drawn(figure)


@pytest.mark.filterwarnings("error")
def test_attention_of_every_head() -> None:
    made = trace()
    figure = made.plot(1)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["head 0", "head 1", "head 2"]
    for head, axes in enumerate(maps):
        np.testing.assert_array_equal(np.ma.getdata(image(axes)), made["pattern", 1][0, head])
    assert ticks(maps[0].yaxis) == LABELS
    assert ticks(maps[2].xaxis) == LABELS
    drawn(figure)


def test_attention_of_chosen_heads_and_positions() -> None:
    made = trace(2, heads={"attn.hook_pattern": (7, 4)})
    np.testing.assert_array_equal(np.ma.getdata(image(made.plot(1, 4).axes[0])), made["pattern", 1][0, 1])
    with pytest.raises(OptionError, match="holds 7, 4"):
        made.plot(1, 0)
    with pytest.raises(KeyError, match=r"blocks\.0\.attn\.hook_pattern was not captured"):
        made.plot(0)
    kept = np.full((1, 1, 2, T), 1 / T, np.float32)
    source = Provenance("small", "", "exact", positions=(2, 5))
    some = Trace([range(T)], [TOKENS], {"blocks.0.attn.hook_pattern": lambda: kept}, lambda: None, source, 1, 1)
    axes = some.plot(head=0).axes[0]
    assert ticks(axes.yaxis) == [LABELS[2], LABELS[5]]
    assert np.ma.getmaskarray(image(axes)).sum(1).tolist() == [T - 3, T - 6]


def test_attention_of_one_token_of_an_answer() -> None:
    row = RNG.random((1, 2, 1, 90)).astype(np.float32)
    source = Provenance("small", "", "fast", positions=(89,))
    made = Trace([[4]], [[" x"]], {"blocks.0.attn.hook_pattern": lambda: row}, lambda: None, source, 1, 1)
    axes = made.plot(head=1).axes[0]
    np.testing.assert_array_equal(image(axes), row[0, 1])
    assert ticks(axes.yaxis) == ["·x"]
    assert ticks(axes.xaxis)[:3] == ["0", "2", "4"]  # 90 do not fit


def test_a_reduced_pattern_is_no_pattern() -> None:
    with pytest.raises(OptionError, match="entropy"):
        trace(reduce={"attn.hook_pattern": "entropy"}).plot()


@dataclass
class Lens:
    layers: tuple[str, ...]
    tokens: tuple[str, ...]
    strings: tuple[tuple[tuple[str, ...], ...], ...]
    logprobs: np.ndarray
    kl: np.ndarray


@pytest.mark.filterwarnings("error")
def test_logit_lens() -> None:
    logprobs = -np.sort(RNG.random((3, T, 2)))
    strings = tuple(tuple((f" {layer}{at}", "-") for at in range(T)) for layer in "abc")
    result = Lens(("embed", "0", "1"), TOKENS, strings, logprobs, RNG.random((3, T)))
    figure = plots.logit_lens(result)
    axes = figure.axes[0]
    np.testing.assert_array_equal(image(axes), np.exp(logprobs[..., 0]))
    assert (ticks(axes.xaxis), ticks(axes.yaxis)) == (LABELS, ["embed", "0", "1"])
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(0, 0)] == "·a0"
    assert texts[(T - 1, 2)] == f"·c{T - 1}"
    drawn(figure)
    np.testing.assert_array_equal(image(plots.logit_lens(result, show="kl").axes[0]), result.kl)
    with pytest.raises(OptionError, match="show"):
        plots.logit_lens(result, show="entropy")


def bars(figure: Figure) -> tuple[list[str], list[float]]:
    axes = figure.axes[0]
    return ticks(axes.yaxis), [float(bar.get_width()) for bar in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]


def test_attribution() -> None:
    @dataclass
    class Attribution:
        token: str
        other: str | None
        components: dict[str, float]

    result = Attribution(" a", " b", {"embed": 0.5, "L0H0": -2.0, "L0H1": 0.1, "0_mlp_out": 1.0})
    figure = plots.attribution(result, top=3)
    assert bars(figure) == (["embed", "L0H0", "0_mlp_out"], [0.5, -2.0, 1.0])
    assert figure.axes[0].get_title() == "Attribution of the logit ·a - ·b"
    assert figure.axes[0].yaxis_inverted()  # the first component stands above
    drawn(figure)


def test_head_scores() -> None:
    @dataclass
    class Scores:
        induction: np.ndarray
        previous_token: np.ndarray
        duplicate_token: np.ndarray

    result = Scores(*RNG.random((3, 4, 2)))
    figure = plots.head_scores(result)
    maps = {axes.get_title(): image(axes) for axes in figure.axes if axes.images}
    for name, values in vars(result).items():
        np.testing.assert_array_equal(maps[name.replace("_", " ")], values)
    drawn(figure)


def test_patching() -> None:
    @dataclass
    class Sweep:
        name: str
        metric: str
        over: str
        corrupt: float
        values: np.ndarray
        layers: tuple[int, ...]
        labels: tuple[str, ...]

    result = Sweep("resid_pre", "logit_diff", "position", -1.0, RNG.normal(size=(2, T)), (3, 5), TOKENS)
    figure = plots.patching(result)
    axes = figure.axes[0]
    np.testing.assert_array_equal(image(axes), result.values)
    assert (ticks(axes.xaxis), ticks(axes.yaxis)) == (LABELS, ["3", "5"])
    low, high = axes.images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(-1)  # white is the corrupt run
    drawn(figure)


def test_saliency_and_compare() -> None:
    @dataclass
    class Saliency:
        strings: tuple[str, ...]
        values: np.ndarray

    values = RNG.normal(size=T)
    assert bars(plots.saliency(Saliency(TOKENS, values))) == (LABELS, values.tolist())

    @dataclass
    class Comparison:
        kl: np.ndarray
        cosine: np.ndarray
        drift: np.ndarray

    result = Comparison(*RNG.random((3, 5)))
    figure = plots.compare(result)
    for axes, values in zip(figure.axes, vars(result).values(), strict=True):
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)
    drawn(figure)


SCORED = (Token(1, "<s>", None), Token(2, " The", -0.5), Token(3, "\n", -2.0))


@pytest.mark.filterwarnings("error")
def test_probabilities() -> None:
    score = Score(SCORED)
    names, widths = bars(score.plot())
    assert names == ["·The", "↵"]
    np.testing.assert_allclose(widths, np.exp([-0.5, -2.0]))
    frame = score.to_frame()
    assert frame["token"].tolist() == ["<s>", " The", "\n"]
    np.testing.assert_allclose(frame["probability"], [np.nan, *np.exp([-0.5, -2.0])])
    token = Token(2, " The", -0.5, (Alternative(2, " The", -0.5), Alternative(4, " A", -1.5)))
    assert bars(plots.probabilities(token))[0] == ["·The", "·A"]
    with pytest.raises(OptionError, match="top_logprobs"):
        plots.probabilities(SCORED[1])


def test_an_answer() -> None:
    def captured(entropy: float) -> Trace:
        values = {"blocks.0.attn.hook_pattern": lambda: np.array([[[entropy], [entropy + 2]]], np.float32)}
        source = Provenance("small", "", "fast", reduce={"attn.hook_pattern": "entropy"}, positions=(3,))
        return Trace([[1]], [["a"]], values, lambda: None, source, 1, 8)

    answer = Generation()
    for number, text in enumerate((" a", "b")):
        answer._put(Token(number, text, -1.0 - number, time=0.1, captures=captured(number)))
    answer._finish("length", Stats())
    assert bars(answer.plot())[0] == ["·a", "b"]
    frame = answer.to_frame()
    assert list(frame) == ["id", "token", "logprob", "probability", "time", "entropy"]
    assert frame["entropy"].tolist() == [1.0, 2.0]


def test_cache() -> None:
    class View:
        strings = TOKENS
        held = RNG.normal(size=(2, 2, 3, T, 4))

        def lengths(self) -> np.ndarray:
            return np.linalg.norm(self.held, axis=-1)

    figure = plots.cache(View())
    maps = [axes for axes in figure.axes if axes.images]
    for axes, held in zip(maps, View.held, strict=True):
        np.testing.assert_allclose(image(axes), np.linalg.norm(held, axis=-1).mean(1))
    assert ticks(maps[1].xaxis) == LABELS
    drawn(figure)


def test_long_texts_stay_of_a_size() -> None:
    n = 700
    pattern = np.tri(n, dtype=np.float32)[None, None]
    values = {"blocks.0.attn.hook_pattern": lambda: pattern}
    made = Trace([range(n)], [["token"] * n], values, lambda: None, Provenance("m", "", "exact"), 1, 1)
    figure = made.plot(head=0)
    assert max(figure.get_size_inches()) <= 18
    assert len(ticks(figure.axes[0].xaxis)) <= plots.NAMED
    assert plots.saliency(type("S", (), {"strings": ["a"] * n, "values": np.ones(n)})).get_size_inches()[1] <= 40


def test_the_ground_is_light_whatever_the_style() -> None:
    with matplotlib.rc_context({"text.color": "white", "figure.facecolor": "black", "axes.facecolor": "black"}):
        figure = trace().plot(1, 0)
    axes = figure.axes[0]
    assert to_hex(figure.get_facecolor()) == plots.GROUND
    assert to_hex(axes.get_facecolor()) == plots.GROUND
    assert axes.title.get_color() == plots.INK


def test_no_pyplot_and_no_display() -> None:
    code = """
import sys, numpy as np
from irkit.trace import Trace, Provenance
t = Trace([[1, 2]], [["a", "b"]], {"blocks.0.attn.hook_pattern": lambda: np.tri(2)[None, None]}, lambda: None,
          Provenance("m", "", "exact"), 1, 1)
t._repr_html_(), repr(t)
assert "matplotlib" not in sys.modules and "pandas" not in sys.modules
t.plot()._repr_png_()
assert "matplotlib.pyplot" not in sys.modules and "jax" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_traces_own_table() -> None:
    shown = trace(2, heads={"attn.hook_pattern": (7, 4)})._repr_html_()
    assert "<td>pattern</td><td>2</td><td>[b, head, query, key]</td>" in shown
    bad = Trace([[1]], [["<b>"]], {}, lambda: None, Provenance("<script>", "", "exact"), 1, 1)
    assert "<script>" not in bad._repr_html_()


def test_to_frame() -> None:
    made = trace(2, heads={"attn.hook_pattern": (4, 7)})
    frame = made.to_frame("pattern")
    assert frame.index.names == ["layer", "b", "head", "query", "token"]
    np.testing.assert_array_equal(frame.to_numpy().reshape(2, 1, 2, T, T), made["pattern"])
    np.testing.assert_array_equal(frame.loc[(3, 0, 7)].to_numpy(), made["pattern", 3][0, 1])
    assert frame.loc[(1, 0, 4)].index.get_level_values("token").tolist() == list(TOKENS)
    np.testing.assert_array_equal(
        made.to_frame("blocks.1.attn.hook_pattern").loc[(0, 4)].to_numpy(), made["pattern", 1][0, 0]
    )
    pair = Largest(RNG.random((1, 2, 3)), np.arange(6, dtype=np.int32).reshape(1, 2, 3))
    source = Provenance("m", "", "exact", reduce={"hook_embed": "top_k"}, positions=(1, 4))
    values = {"hook_embed": lambda: pair}
    table = Trace([range(T)], [TOKENS], values, lambda: None, source, 1, 1).to_frame("embed")
    assert table.index.tolist() == [(0, 1, " The"), (0, 4, "extraordinarily")]
    assert table["indices"].to_numpy().tolist() == pair.indices[0].tolist()
    with pytest.raises(KeyError, match="not held"):
        made.to_frame("z")
