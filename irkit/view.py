"""Views for notebooks, each by the name of what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from irkit.analysis import LogitLens
    from irkit.engine import CacheView
    from irkit.session import Session
    from irkit.trace import Trace
    from irkit.widgets.attention import AttentionView
    from irkit.widgets.cache import CacheWidget
    from irkit.widgets.lens import LensView
    from irkit.widgets.steering import SteeringPanel
    from irkit.widgets.watch import WatchView

__all__ = ["attention", "cache", "lens", "steering", "watch"]


def attention(trace: Trace, text: int = 0, **chosen: Any) -> AttentionView:
    """The attention patterns that a trace holds: all heads at a glance, and one in full.

    Args:
        trace: With `pattern`, not reduced.
        text: Which one of a batch.
        chosen: What to begin with: `layer`, `head`, `token`, `sort` ("model", "entropy", "previous_token" or
            "induction"), `direction` ("reads" or "read_by"), `mask_first`, `colours` ("viridis" or "cividis").

    Raises:
        OptionError: the trace does not hold them, or there is nothing like what was chosen.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.attention import AttentionView

    return AttentionView(trace, text, **chosen)


def lens(found: LogitLens, **chosen: Any) -> LensView:
    """A logit lens: the likeliest next token of each layer at each position, and one token followed through them.

    Args:
        found: What `Session.lens` or `irkit.analysis.logit_lens` returns.
        chosen: What to begin with: `layer` (as the lens names it), `position`, `locked`, `shown` ("probability", "kl"
            or "rank"), `colours` ("viridis" or "cividis").

    Raises:
        OptionError: there is nothing like what was chosen.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.lens import LensView

    return LensView(found, **chosen)


def steering(session: Session, vectors: Mapping[str, Any] | None = None, **chosen: Any) -> SteeringPanel:
    """Sliders for steering vectors, heads and layers, and the answer with what they edit beside the one without.

    Args:
        session: Whose model answers; its own cache is left as it is.
        vectors: By name, arrays `[d_model]` or what `irkit.analysis.steering_vector` finds.
        chosen: What to begin with: `prompt`, `as_message`, `live`, `vectors`, `heads`, `layers`; and the options of
            `Session.generate` that both answers are made with.

    Raises:
        OptionError: a vector does not fit the model, there is nothing like what was chosen, or irkit's extra `notebook`
            is not installed.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.steering import SteeringPanel

    return SteeringPanel(session, vectors, **chosen)


def cache(of: Session | CacheView, **chosen: Any) -> CacheWidget:
    """A KV cache: its tokens, how long their keys and values are by layer; to rewind, to fork and to drop from.

    Args:
        of: A session, whose answers the view follows, or a cache alone.
        chosen: What to begin with: `position`, `until`, `layer`, `shown` ("keys" or "values"), `head` (-1 for the mean
            over all), `scaled_by` ("layer" or "all"), `colours` ("viridis" or "cividis").

    Raises:
        OptionError: there is nothing like what was chosen, the session is closed, or irkit's extra `notebook` is not
            installed.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.cache import CacheWidget

    return CacheWidget(of, **chosen)


def watch(session: Session, **chosen: Any) -> WatchView:
    """What a session answers while it answers it, to the notebook and to whoever asks over HTTP; each token can be
    looked into.

    Args:
        session: Whose answers, and those of its forks and of `Session.serve`, are shown.
        chosen: What to begin with: `follow`, whether the newest answer is shown in full.

    Raises:
        OptionError: there is nothing like what was chosen, the session is closed, or irkit's extra `notebook` is not
            installed.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.watch import WatchView

    return WatchView(session, **chosen)
