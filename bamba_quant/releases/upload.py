"""Uploads the folders of a release to repositories of the Hub, private ones unless they are wanted public.

huggingface_hub goes on where an interrupted upload was: files that a repository has are not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bamba_quant.releases.card import About
from bamba_quant.releases.preset import ReleaseError
from bamba_quant.releases.tasks import Release


def check_repository(repository: str) -> None:
    """Raise ``ReleaseError`` unless ``repository`` is owner/name, as the Hub has them."""
    _check(f"{repository}-GGUF", repository)


def check_repositories(release: Release, told: About) -> None:
    """Raise ``ReleaseError`` unless the Hub has names such as those of all the release's repositories."""
    for folder in release.folders.values() if told.repository else ():
        _check(told.repository_of(release, folder), told.repository)


def _check(name: str, given: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        said = "" if name.count("/") == 1 else "not one /"
    except HFValidationError as error:
        said = str(error)
    if said:
        raise ReleaseError(
            "not a name of a repository",
            where=name,
            found=f"{given!r}: {said}",
            expected="OWNER/NAME, NAME with what the release adds of 96 characters at most",
            fix="--upload OWNER/NAME",
        )


def upload(
    release: Release,
    told: About,
    files: Mapping[str, Sequence[Path]],
    *,
    private: bool = True,
    note: Callable[[str], None] = lambda note: None,
) -> tuple[str, ...]:
    """Upload ``files``, by folder, to the repositories that ``told`` names, which are made; their addresses.

    A repository that exists keeps its visibility. Raises ``ReleaseError`` for what the Hub refuses, and where it cannot
    be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    addresses = []
    for folder, some in files.items():
        repository, place = told.repository_of(release, folder), release.directory / folder
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            info = api.repo_info(repository)
            if bool(info.private) != private:
                note(f"{repository} exists and stays {'private' if info.private else 'public'}")
            api.upload_folder(
                repo_id=repository,
                folder_path=place,
                allow_patterns=[file.relative_to(place).as_posix() for file in some],
                commit_message="Release made by bamba-quant",
            )
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise ReleaseError(
                "the upload failed",
                where=repository,
                found=" ".join(str(error).split()) or type(error).__name__,
                fix="check the network and the token (hf auth login), then run again: what was sent is not sent again",
            ) from error
        addresses.append(str(address))
    return tuple(addresses)
