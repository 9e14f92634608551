"""Addresses, credentials and listings of a Hugging Face hub, by the user's HF_ENDPOINT and HF_TOKEN.

Both are read from the environment at every call; `huggingface_hub` itself reads the endpoint only once.
"""

import os
import re

from irkit import gguf
from irkit.errors import OptionError, PullError
from irkit.hub.addresses import CONNECT_SECONDS
from irkit.hub.catalog import HubFile
from irkit.hub.naming import labelled

USUAL = "Q4_K_M"
"""What people take unless they want something else, as in Ollama and llama.cpp."""

_ADDRESS = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?(/[!-~]*)?")


def file_url(file: HubFile) -> str:
    """The address of a file.

    Raises:
        OptionError: the repository or the path cannot be one, or HF_ENDPOINT is no address.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if not {".", "..", ""}.isdisjoint(file.file.split("/")):
        raise OptionError(f"{file.file!r} is no path of a file in a repository")
    try:
        return hf_hub_url(file.repo, file.file, endpoint=_endpoint())
    except HFValidationError as error:
        raise OptionError(f"{file.repo!r} is no Hugging Face repository: {error}") from error


def credentials(url: str) -> dict[str, str]:
    """The headers that identify the user to the hub; none if `url` is not on the hub."""
    from huggingface_hub import get_token

    token = get_token() if url.startswith(_endpoint() + "/") else None
    return {"Authorization": f"Bearer {token}"} if token else {}


def choose(repo: str, quantization: str | None) -> str:
    """The one .gguf file of `repo` that has `quantization` in its name, or the first part of the one split model.

    Without `quantization`, it is the only model there is, or else the one in Q4_K_M.

    Raises:
        PullError: the repository cannot be listed, or there is not just one such file; the message lists
            those there are.
        OptionError: `repo` cannot be a repository, or HF_ENDPOINT is no address.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    api = HfApi(endpoint=_endpoint(), token=get_token() or False)
    try:
        listing = api.model_info(repo, timeout=CONNECT_SECONDS)
    except HFValidationError as error:
        raise OptionError(f"{repo!r} is no Hugging Face repository: {error}") from error
    # The connection errors are those of requests, httpx or httpx2, as huggingface_hub's version has it.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PullError(f"the files of {repo} at {api.endpoint} cannot be listed: {reason}") from error
    names = sorted(sibling.rfilename for sibling in listing.siblings or ())
    # A "mmproj" file is the image half of a model.
    ggufs = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    matching = ggufs if quantization is None else [name for name in ggufs if labelled(name, quantization)]
    # Of a split model's parts, the first stands for all.
    found = sorted({(gguf.part_names(name) or [name])[0] for name in matching})
    if quantization is None and len(found) > 1:
        found = [name for name in found if labelled(name, USUAL)] or found
    if len(found) == 1:
        return found[0]
    problem = f"{len(found)} files for {quantization}" if quantization else f"{len(found)} models"
    raise PullError(f"{repo} has {problem}, not one; its .gguf files are: {', '.join(ggufs) or 'none'}")


def _endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not _ADDRESS.fullmatch(endpoint):
        raise OptionError(f"HF_ENDPOINT is no http or https address: {endpoint!r}")
    return endpoint
