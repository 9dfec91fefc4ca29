"""Downloads with pooch, verified against a published hash."""

from __future__ import annotations

from pathlib import Path


def download(url: str, path: Path, known_hash: str, remedy: str) -> None:
    """Download a file, unless it exists with the right hash.

    Args:
        url: the address.
        path: the local path.
        known_hash: the algorithm and the hexadecimal digest, such as ``"md5:..."``.
        remedy: what the user can do without a network, for the error message.

    Raises:
        ConnectionError: the download failed.
        ValueError: the downloaded file has another hash.
    """
    import pooch

    try:
        pooch.retrieve(url, known_hash, fname=path.name, path=path.parent)
    except OSError as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}); {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{url} is not the published file ({error}); {remedy}") from error
