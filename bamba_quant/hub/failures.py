"""What huggingface_hub raises, as errors that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from bamba_quant.errors import BambaQuantError, CheckpointError, FetchError
from bamba_quant.hub.reference import Reference

_TOKEN = "set HF_TOKEN to a token of an account that may read it, or run `hf auth login`"


@contextmanager
def hub_errors(reference: Reference, *, streaming: bool = False) -> Iterator[None]:
    """Raise ``CheckpointError`` for whatever goes wrong with the Hub inside the block.

    With ``streaming`` it is a ``FetchError``: an output is being written, so the model is there.
    """
    try:
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise CheckpointError(
            "there is no such file or directory, and models of the Hub need huggingface_hub",
            where=str(reference),
            fix="pip install 'bamba-quant[hub]', or correct the path",
        ) from error
    try:
        yield
    except BambaQuantError:
        raise
    except (errors.HTTPError, errors.RevisionResolutionError, ValueError, ConnectionError, OSError) as error:
        raise _named(error, reference, f"{constants.ENDPOINT}/{reference.repository}", streaming) from error


def _named(error: Exception, reference: Reference, url: str, streaming: bool) -> CheckpointError:
    from huggingface_hub import constants, errors, get_token

    def failure(what: str, fix: str, found: object = None) -> CheckpointError:
        kind = FetchError if streaming else CheckpointError
        return kind(what, where=f"{reference} ({url})", found=found, fix=fix)

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    status = next(
        (each.response.status_code for each in causes if isinstance(each, errors.HfHubHTTPError)), 0
    )

    def is_any(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in causes)

    if is_any(errors.GatedRepoError):
        login = "" if get_token() else f", then {_TOKEN}"
        return failure("the model is gated", f"accept its terms at {url}{login}", f"status {status}")
    if is_any(errors.RevisionNotFoundError):
        return failure("the repository has no such revision", "give a branch, a tag or a commit of it")
    if is_any(errors.RepositoryNotFoundError):
        return failure(
            "there is no such file or directory, and the Hub has no such repository or it is private",
            f"correct the path or the name; for a private repository {_TOKEN}",
            f"status {status}",
        )
    if status == 401:
        return failure("the Hub does not accept the token", f"{_TOKEN}, or unset HF_TOKEN", "status 401")
    if status == 403:
        return failure("the token may not read the repository", _TOKEN, "status 403")
    if is_any(errors.RemoteEntryNotFoundError):
        return failure("the repository has no such file", "give a file of it", error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        if streaming:
            return failure("the output's disk is full", "free some space", error.strerror)
        return failure(
            "the disk is full",
            "free some space, set HF_HOME to a directory on another disk, or convert with --stream-from-hub",
            f"{constants.HF_HUB_CACHE}: {error.strerror}",
        )
    if is_any(errors.OfflineModeIsEnabled):
        return failure(
            "there is no such file or directory, and the cache does not hold all files of that model",
            f"unset HF_HUB_OFFLINE, or fetch it first: hf download {reference.repository}",
            f"HF_HUB_OFFLINE is set; the cache is {constants.HF_HUB_CACHE}",
        )
    if isinstance(error, ValueError) and not isinstance(error, errors.HTTPError):
        return failure("this is not a name of a model on the Hub", "write org/name", error)
    if status:
        return failure(
            "the Hub failed", "run the command again later; whole files are kept", f"status {status}"
        )
    found = str(causes[-1]).splitlines()[0] if str(causes[-1]) else type(causes[-1]).__name__
    if streaming:
        fix = "check the connection and HF_ENDPOINT, then run the command again: it keeps whole files"
        return failure("the Hub cannot be reached or broke off", fix, found)
    return failure(
        "there is no such file or directory, and the Hub cannot be reached or broke off",
        "check the path, the connection and HF_ENDPOINT, then run the command again: it keeps whole files; without a "
        "connection, HF_HUB_OFFLINE=1 takes models from the cache",
        found,
    )
