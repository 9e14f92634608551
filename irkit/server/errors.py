"""Errors as each API's clients expect them: OpenAI's under /v1, `{"error": "..."}` everywhere else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from irkit.errors import (
    BackendError,
    BudgetError,
    BusyError,
    ContextFullError,
    IrkitError,
    ModelNotFoundError,
    OptionError,
    PullError,
    UnsupportedModelError,
)

STATUSES = {
    OptionError: 400,
    ContextFullError: 400,
    UnsupportedModelError: 400,
    BackendError: 400,
    ModelNotFoundError: 404,
    PullError: 502,
    BudgetError: 413,
    BusyError: 503,
}
"""The HTTP status of each error; 500 where it is not the request's fault."""

RETRY_AFTER = 2
"""Seconds after which a client may try again where the server is busy."""

_CODES = {ModelNotFoundError: "model_not_found", ContextFullError: "context_length_exceeded"}
_CODE_OF_STATUS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


@dataclass(frozen=True)
class Fault:
    """What went wrong with a request."""

    message: str
    status: int
    code: str | None = None
    """OpenAI's name for it, if there is one."""
    param: str | None = None
    """The field of the request that is to blame, where it is one."""

    def body(self, path: str) -> dict[str, Any]:
        """The JSON object that tells the client who asked for `path`."""
        if not path.startswith("/v1/"):
            return {"error": self.message}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        code = self.code or _CODE_OF_STATUS.get(self.status)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": code}}

    def reply(self, path: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The response to a request for `path`."""
        again = {"Retry-After": str(RETRY_AFTER)} if self.status == 503 else {}
        return JSONResponse(self.body(path), self.status, {**again, **(headers or {})})


def fault(error: BaseException) -> Fault:
    """What to tell of an error: nothing of what nobody expected."""
    if isinstance(error, HTTPException):
        return Fault(error.detail, error.status_code)
    if not isinstance(error, IrkitError):
        return Fault("internal error", 500)
    status = next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    return Fault(str(error), status, code, error.option if isinstance(error, OptionError) else None)
