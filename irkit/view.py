"""Views for notebooks, each by the name of what it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.analysis import LogitLens
    from irkit.trace import Trace
    from irkit.widgets.attention import AttentionView
    from irkit.widgets.lens import LensView

__all__ = ["attention", "lens"]


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
