"""Errors as OpenAI's API answers them: an HTTP status and a body that clients know how to read."""

from __future__ import annotations

from typing import Any

from tkit.errors import TkitError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
TOO_LONG = "context_length_exceeded"
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}


class ApiError(TkitError):
    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code or CODES.get(status)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
