"""What an error of a store behind fsspec means: its HTTP status, the store's own code, and whether it may pass.

A newcomer's trap: s3fs translates botocore's errors into OSErrors by code, and the status is left in their cause only;
other file systems of fsspec keep it in attributes of other names.
"""

import re

_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_PASSING_STATUS = (408, 429)
_PASSING_CODES = (
    *("RequestTimeout", "SlowDown", "ConditionalRequestConflict", "OperationAborted", "IncompleteBody", "BadDigest"),
    "NoSuchUpload",  # a put in parts whose last answer was lost: s3fs then takes back what is done already
    *("XAmzContentSHA256Mismatch", "Throttling", "ThrottlingException", "RequestLimitExceeded", "InternalError"),
)
# by name, since neither botocore nor aiohttp need be installed: no connection, a broken one, an answer cut short
_PASSING_ERRORS = {
    *(
        "HTTPClientError",
        "EndpointConnectionError",
        "ConnectTimeoutError",
        "ResponseParserError",
        "IncompleteReadError",
    ),
    *("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError", "HTTPException", "ChecksumError"),
    *("IncompleteRead", "FlexibleChecksumError", "ResponseStreamingError"),
}


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: no answer, a broken one, or a store that says that it is busy."""
    # first what it is: the cause of a body that was cut short is, to aiohttp, a bad request with status 400
    for known in _chain(error):
        is_os_error = isinstance(known, (TimeoutError, ConnectionError))
        if is_os_error or _PASSING_ERRORS & {kind.__name__ for kind in type(known).__mro__}:
            return True
    status = status_of(error)
    return code_of(error) in _PASSING_CODES or status in _PASSING_STATUS or (status >= 500 and status != 501)


def is_refusal(error: Exception) -> bool:
    """Whether the store, or the library before it, finds the credentials lacking."""
    return isinstance(error, PermissionError) or type(error).__name__ in _CREDENTIAL_ERRORS


def status_of(error: BaseException) -> int:
    """The HTTP status that `error` stands for, 0 if it stands for none."""
    for known in _chain(error):
        response = getattr(known, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        for name in ("status", "status_code", "code"):
            value = getattr(known, name, None)
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return 0


def code_of(error: BaseException) -> str:
    """The store's own word for `error`, '' if there is none."""
    for known in _chain(error):
        response = getattr(known, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and len(chain) < 5:
        chain.append(error)
        error = error.__cause__
    return chain


def said_by(error: BaseException) -> str:
    """What `error` says in one line, without what may be secret in the addresses it shows: users and queries."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(str(said).split()) or type(error).__name__
    return re.sub(r"\?[^\s\"']*|(?<=//)[^\s/@]*@", "", text).rstrip(".")
