"""Models in an Ollama registry: a manifest that names the layers, and each layer a file named by its digest.

The protocol is that of OCI's distribution specification, the media types are Ollama's.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError

from irkit.errors import OptionError, PullError
from irkit.hub import addresses
from irkit.hub.catalog import OllamaModel
from irkit.hub.checked import checked_options, checked_template

if TYPE_CHECKING:
    import httpx

HOST = "https://registry.ollama.ai"
"""The registry of models that are named without one."""

_ACCEPT = "application/vnd.docker.distribution.manifest.v2+json"
LAYER = "application/vnd.ollama.image."
"""How the media types of all layers begin."""
# The most bytes of a manifest, or of a layer that is text.
_LONGEST = 1 << 20
_PARAMETER = re.compile(r'(realm|service|scope)="([^"]*)"')


def base_url(model: OllamaModel) -> str:
    """Where the registry has what belongs to a model."""
    return f"{model.host}/v2/{model.name}"


@dataclass(frozen=True)
class Layer:
    """One file of a model; `digest` is "sha256:" and 64 digits, `size` in bytes."""

    mediaType: str  # noqa: N815
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Manifest:
    """What an Ollama model is made of."""

    layers: list[Layer]


@dataclass(frozen=True)
class Found:
    """What a registry has of a model: the GGUF file's layer, what else belongs into its manifest, and the headers that
    fetching the file takes."""

    layer: Layer
    own: dict[str, Any]
    headers: dict[str, str]


def look_up(model: OllamaModel, *, allow_private: bool) -> Found:
    """Reads the manifest of a model, and the layers that are text.

    Raises:
        PullError: there is no such model, or none that irkit can run; the message says so.
    """
    import httpx

    where = f"{model.name}:{model.tag} at {urlsplit(model.host).hostname}"
    try:
        with addresses.open_client(
            base_url(model), {"Accept-Encoding": "identity"}, allow_private=allow_private
        ) as client:
            manifest, headers = _manifest(client, model, where)
            by_kind = {layer.mediaType.removeprefix(LAYER): layer for layer in manifest.layers}
            if "adapter" in by_kind:
                raise PullError(f"{where} is a model with an adapter, which is not supported")
            if "model" not in by_kind:
                raise PullError(f"{where} has no GGUF file")
            if "projector" in by_kind:
                warnings.warn(
                    f"{where} can look at images, which is not supported: that part is left out", stacklevel=2
                )
            texts = {
                kind: _text(client, model, by_kind[kind], headers, where)
                for kind in ("template", "system", "params", "license")
                if kind in by_kind
            }
    except httpx.HTTPError as error:
        raise PullError(f"{where}: {str(error) or type(error).__name__}") from error
    return Found(by_kind["model"], own(texts, where), headers)


def own(texts: Mapping[str, str], where: str) -> dict[str, Any]:
    """Fields of irkit's manifest, from the layers that are text, by kind; what cannot be used here is left out with a
    warning."""
    fields: dict[str, Any] = {"system": texts.get("system"), "license": texts.get("license")}
    if "template" in texts:
        try:
            fields["template"] = checked_template(texts["template"])
        except OptionError as error:
            warnings.warn(f"{where}: {error}; the model file's own is used", stacklevel=3)
    options: dict[str, Any] = {}
    try:
        params = json.loads(texts.get("params", "{}"))
    except (ValueError, RecursionError):
        params = {}
    for name, value in params.items() if isinstance(params, dict) else ():
        try:
            options |= checked_options({name: value})
        except OptionError as error:
            warnings.warn(f"{where}: {error}; left out", stacklevel=3)
    return fields | {"options": options}


def _manifest(client: "httpx.Client", model: OllamaModel, where: str) -> tuple[Manifest, dict[str, str]]:
    url, headers = f"{base_url(model)}/manifests/{model.tag}", {}
    response, body = _get(client, url, {"Accept": _ACCEPT}, where)
    if response.status_code == 401:
        headers = _authorize(client, model, response.headers.get("WWW-Authenticate", ""), where)
        response, body = _get(client, url, {"Accept": _ACCEPT} | headers, where)
    if response.status_code in (401, 403, 404):
        raise PullError(f"there is no {where}")
    if response.status_code != 200:
        raise PullError(f"{where}: the registry answers {response.status_code}")
    try:
        return TypeAdapter(Manifest).validate_json(body), headers
    except ValidationError as error:
        raise PullError(f"{where}: what the registry sends is no manifest: {error.errors()[0]['msg']}") from None


def _authorize(client: "httpx.Client", model: OllamaModel, challenge: str, where: str) -> dict[str, str]:
    """The header that a registry asks for, with the token that it gives to everybody."""
    asked = dict(_PARAMETER.findall(challenge))
    realm = asked.pop("realm", "")
    # Another host would learn what is asked for, and could be one that only this machine reaches.
    if urlsplit(realm)[:2] != urlsplit(model.host)[:2]:
        raise PullError(f"{where} needs a token from {realm[:200]!r}, which is not the registry's own host")
    import httpx

    response, body = _get(client, str(httpx.URL(realm, params=asked)), {}, where)
    try:
        token = json.loads(body)["token"] if response.status_code == 200 else None
    except (ValueError, KeyError, TypeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise PullError(f"{where} needs a token, which the registry does not give")
    return {"Authorization": f"Bearer {token}"}


def _text(client: "httpx.Client", model: OllamaModel, layer: Layer, headers: Mapping[str, str], where: str) -> str:
    response, body = _get(client, f"{base_url(model)}/blobs/{layer.digest}", headers, where)
    if response.status_code != 200:
        raise PullError(f"{where}: the registry answers {response.status_code} for {layer.digest}")
    if f"sha256:{hashlib.sha256(body).hexdigest()}" != layer.digest:
        raise PullError(f"{where}: the bytes of {layer.digest} have another sha256")
    return body.decode("utf-8", "replace")


def _get(client: "httpx.Client", url: str, headers: Mapping[str, str], where: str) -> "tuple[httpx.Response, bytes]":
    """An answer, and its body as it was sent: compressed bytes are refused, not unpacked."""
    with client.stream("GET", url, headers=dict(headers)) as response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise PullError(f"{where}: the registry sends compressed bytes, though it was asked not to")
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > _LONGEST:
                raise PullError(f"{where}: the registry sends more than {_LONGEST} bytes of text")
    return response, bytes(body)
