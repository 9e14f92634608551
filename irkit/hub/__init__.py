"""Models by name: the registry of those on this machine, and how others get here.

A model is registered in place with `add`, or fetched with `pull`. `resolve` finds the file of a model, and
`ensure` fetches it first if irkit knows where it is.
"""

from irkit.hub.catalog import CATALOG
from irkit.hub.create import as_jinja, blob, blob_writer, copy, create
from irkit.hub.download import Progress
from irkit.hub.modelfile import Modelfile, read_modelfile
from irkit.hub.pull import ensure, pull, pulled
from irkit.hub.registry import Manifest, add, find, home, manifest, models, remove, resolve

__all__ = [
    "CATALOG",
    "Manifest",
    "Modelfile",
    "Progress",
    "add",
    "as_jinja",
    "blob",
    "blob_writer",
    "copy",
    "create",
    "ensure",
    "find",
    "home",
    "manifest",
    "models",
    "pull",
    "pulled",
    "read_modelfile",
    "remove",
    "resolve",
]
