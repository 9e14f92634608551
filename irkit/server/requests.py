"""From the bytes of a request to a checked model of it."""

from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import Request

from irkit.errors import OptionError
from irkit.options import Options, parse

MAX_BODY = 32 << 20
"""The most bytes a request may have."""

_Model = TypeVar("_Model", bound=Options)


async def read(request: Request, model: type[_Model]) -> _Model:
    """The body of `request`, JSON whatever its content type says: curl -d and many clients send another.

    Raises:
        OptionError: the body is no JSON object, or does not fit `model`.
        HTTPException: 413, the body has more than `MAX_BODY` bytes.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the request has more than {MAX_BODY} bytes")
    if not body:
        raise OptionError("the request has no body: a JSON object is needed")
    try:
        given = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise OptionError(f"the request is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise OptionError("the request must be a JSON object")
    return parse(model, given)


def body_of(model: type[Options]) -> dict[str, Any]:
    """What OpenAPI says of a route whose body is `read` as `model`."""
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}
