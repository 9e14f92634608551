"""Models by name: the registry of those on this machine, and how others get here.

A model is registered in place with `add`, or fetched with `pull`; those of Ollama, LM Studio and the Hugging Face cache
are found where they lie. `resolve` finds the file of a model, and `ensure` fetches it first if irkit knows where it is.
"""

from irkit.hub.catalog import CATALOG
from irkit.hub.checked import as_jinja
from irkit.hub.create import blob, blob_writer, copy, create
from irkit.hub.download import Progress
from irkit.hub.lookup import find, manifest, models, names, near, remove, resolve
from irkit.hub.modelfile import Modelfile, read_modelfile
from irkit.hub.naming import OnlyName, own_name
from irkit.hub.pull import ensure, pull
from irkit.hub.registry import Manifest, add, home

__all__ = [
    "CATALOG",
    "Manifest",
    "Modelfile",
    "OnlyName",
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
    "names",
    "near",
    "own_name",
    "pull",
    "read_modelfile",
    "remove",
    "resolve",
]
