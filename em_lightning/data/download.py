"""Downloads: over TLS, and kept only if they are what was published."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import torch

SCHEMES = ("https://",)


def fetch(url: str, path: Path, digest: str, remedy: str, unpacked: bool = False) -> None:
    """Fetch a file unless it is there, and keep it only if it has a digest.

    Args:
        url: over https, whose certificate is verified.
        path: where the file goes.
        digest: SHA-256, or MD5 by its length, where that is what was published.
        remedy: what to do where there is no network.
        unpacked: whether the digest is that of what the gzip file unpacks to.

    Raises:
        ConnectionError: the file could not be fetched.
        ValueError: what was fetched is another file, or the address is not one of https.
    """
    if path.is_file():
        return
    if not url.startswith(SCHEMES):
        raise ValueError(f"{url} is not fetched over https; {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fetched = path.with_name("fetched-" + path.name)
    try:
        torch.hub.download_url_to_file(url, str(fetched), progress=False)
    except OSError as error:
        raise ConnectionError(f"{url} could not be downloaded ({error}); {remedy}") from error
    try:
        found = file_digest(fetched, "md5" if len(digest) == 32 else "sha256", unpacked)
    except (OSError, EOFError, zlib.error) as error:
        found = f"none, damaged: {error}"
    if found != digest:
        fetched.unlink()
        raise ValueError(f"{url} is another file than the published one (digest {found}, not {digest}); {remedy}")
    fetched.replace(path)


def file_digest(path: Path, kind: str, unpacked: bool) -> str:
    """Return the digest of a file, or of what it unpacks to, in hexadecimal digits; it is read piece by piece."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with gzip.open(path) if unpacked else path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
