"""Downloads with pooch, verified against a published hash."""

from __future__ import annotations

from pathlib import Path


def download(url: str, path: Path, known_hash: str, remedy: str) -> None:
    """Download a file, unless it exists with the right hash, such as ``"md5:..."``; errors end with the remedy."""
    import pooch

    try:
        pooch.retrieve(url, known_hash, fname=path.name, path=path.parent)
    except OSError as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url} is not the published file ({error}); {remedy}") from error
