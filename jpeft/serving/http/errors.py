"""Errors of the server, in the form of OpenAI's."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}
_TYPES |= {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}


class HTTPError(Exception):
    """An error with a status of HTTP.

    Attributes:
      status: the status.
      message: what is wrong, in one line.
      param: the field of the body that is wrong, if it is one.

    >>> HTTPError(404, "the model 'ab' does not exist", "model").body()["error"]["type"]
    'not_found_error'
    """

    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}
