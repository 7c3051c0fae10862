"""Errors, in the shape of each API."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from cpucache.errors import ContextFull, CpucacheError, InputError, PMLError

_OPENAI = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 501: "not_supported_error"}
_ANTHROPIC = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """An error that is sent to the client with an HTTP status. ``message`` tells the client what to do about it."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.code = code


def refusal_of(error: BaseException) -> Refusal:
    """Returns the refusal to send for any error. Unexpected errors become a 500 that reveals nothing."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ContextFull):
        return Refusal(400, str(error), code="context_length_exceeded")
    if isinstance(error, PMLError):
        return Refusal(400, "\n".join(map(str, (error, *error.others))))
    if isinstance(error, InputError):
        return Refusal(400, str(error))
    if isinstance(error, TimeoutError):
        return Refusal(503, "the request took longer than the server allows (--timeout)", retry_after=1)
    if isinstance(error, RequestValidationError):
        told = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()]
        return Refusal(400, "; ".join(told) or "the request is not valid JSON")
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail))
    if isinstance(error, CpucacheError):
        return Refusal(500, str(error))
    return Refusal(500, "the server failed; see its log")


def body_of(refusal: Refusal, path: str) -> dict[str, Any]:
    """JSON body of a refusal: in Anthropic's shape under ``/v1/messages``, in OpenAI's elsewhere."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": refusal.message}}
    kind = _OPENAI.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}}


def response_of(error: BaseException, request: Request) -> JSONResponse:
    """HTTP response to a request that failed."""
    refusal = refusal_of(error)
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    return JSONResponse(body_of(refusal, request.scope["path"]), refusal.status, headers)
