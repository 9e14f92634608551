"""Addresses, credentials and listings of a Hugging Face hub, by the user's HF_ENDPOINT and HF_TOKEN.

Both are read from the environment at every call; `huggingface_hub` itself reads the endpoint only once.
"""

import os
import re

from irkit.errors import OptionError, PullError
from irkit.hub.catalog import HubFile
from irkit.hub.download import CONNECT_SECONDS

# One of the numbered parts that a large model is cut into.
SPLIT_FILE = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf", re.IGNORECASE)

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
    """The one .gguf file of `repo` that has `quantization` in its name; without that, the only one there is.

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
    if quantization is None:
        matching = ggufs
    else:
        label = re.compile(rf"(^|[-._/]){re.escape(quantization)}(?![A-Za-z0-9_])", re.IGNORECASE)
        matching = [name for name in ggufs if label.search(name)]
    whole = [name for name in matching if not SPLIT_FILE.search(name)]
    if len(whole) == 1:
        return whole[0]
    if matching and not whole:
        raise PullError(f"{repo} has {quantization or 'its model'} only in parts; split models cannot be pulled")
    problem = f"{len(whole)} files for {quantization}" if quantization else f"{len(whole)} models"
    raise PullError(f"{repo} has {problem}, not one; its .gguf files are: {', '.join(ggufs) or 'none'}")


def _endpoint() -> str:
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not _ADDRESS.fullmatch(endpoint):
        raise OptionError(f"HF_ENDPOINT is no http or https address: {endpoint!r}")
    return endpoint
