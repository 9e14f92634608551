"""Views for notebooks, each by the name of what it shows.

They need the extra `notebook`: pip install 'irkit[notebook]'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.trace import Trace
    from irkit.widgets.attention import AttentionView

__all__ = ["attention"]


def attention(trace: Trace, text: int = 0, **chosen: Any) -> AttentionView:
    """The attention patterns that a trace holds: all heads at a glance, and one in full.

    Args:
        trace: With `pattern`, not reduced.
        text: Which one of a batch.
        chosen: What to begin with: `layer`, `head`, `token`, `sort` ("model", "entropy", "previous_token" or
            "induction"), `direction` ("reads" or "read_by"), `mask_first`, `colours` ("viridis" or "cividis").

    Raises:
        OptionError: the trace does not hold them, there is nothing like what was chosen, or irkit's extra `notebook`
            is not installed.
    """
    import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
    from irkit.widgets.attention import AttentionView

    return AttentionView(trace, text, **chosen)
