"""Analysis: functions of a `Session` and a `Trace`, each with the source of its formula.

What they return is plain: frozen dataclasses of numpy arrays, with a table as text, `.plot()` and `.to_frame()`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.analysis.attribution import (
        LogitAttribution,
        accumulated_resid,
        apply_ln_to_stack,
        decompose_resid,
        logit_attribution,
        logit_attrs,
        stack_head_results,
    )
    from irkit.analysis.comparison import Comparison, Disagreement, compare
    from irkit.analysis.gradients import AttributionPatching, Saliency, attribution_patching, saliency
    from irkit.analysis.heads import HeadScores, attention_rollout, head_scores, pattern_scores
    from irkit.analysis.lens import LogitLens, logit_lens, next_token_probs
    from irkit.analysis.patching import PatchingSweep, patching_sweep
    from irkit.analysis.steering import SteeringVector, steering_vector

__all__ = [
    "AttributionPatching",
    "Comparison",
    "Disagreement",
    "HeadScores",
    "LogitAttribution",
    "LogitLens",
    "PatchingSweep",
    "Saliency",
    "SteeringVector",
    "accumulated_resid",
    "apply_ln_to_stack",
    "attention_rollout",
    "attribution_patching",
    "compare",
    "decompose_resid",
    "head_scores",
    "logit_attribution",
    "logit_attrs",
    "logit_lens",
    "next_token_probs",
    "patching_sweep",
    "pattern_scores",
    "saliency",
    "stack_head_results",
    "steering_vector",
]

# Each is imported when it is first asked for, as in `irkit` itself.
_WHERE = {
    "attribution": (
        "LogitAttribution",
        "accumulated_resid",
        "apply_ln_to_stack",
        "decompose_resid",
        "logit_attribution",
        "logit_attrs",
        "stack_head_results",
    ),
    "comparison": ("Comparison", "Disagreement", "compare"),
    "gradients": ("AttributionPatching", "Saliency", "attribution_patching", "saliency"),
    "heads": ("HeadScores", "attention_rollout", "head_scores", "pattern_scores"),
    "lens": ("LogitLens", "logit_lens", "next_token_probs"),
    "patching": ("PatchingSweep", "patching_sweep"),
    "steering": ("SteeringVector", "steering_vector"),
}
_LAZY = {name: f"irkit.analysis.{module}" for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'irkit.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
