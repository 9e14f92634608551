"""Loads a model once, and computes on one thread what sessions ask of it; knows no HTTP and no widgets.

Importing it imports no jax: that happens when something is first computed.
"""

from irkit.engine.cache import Cache
from irkit.engine.cacheview import CacheView
from irkit.engine.model import Model, open_model

__all__ = ["Cache", "CacheView", "Model", "open_model"]
