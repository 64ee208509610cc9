"""Folders from the Hugging Face hub: an id stands for the folder that it is downloaded to."""

from __future__ import annotations

import os
import re
import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What of a model is fetched: no pickles, and no weights in other formats."""
CONNECT_SECONDS = 3.0


def folder_of(path: str) -> str:
    """The folder of a hub id (owner/name) in Hugging Face's own cache, downloaded if need be; any other path as it is."""
    return path if Path(path).exists() or not ID.fullmatch(path) else fetched(path)[0] or path


def absence(path: str) -> str | None:
    """Why a hub id has no folder, in words; None for what exists, or is no id."""
    return None if Path(path).exists() or not ID.fullmatch(path) else fetched(path)[1]


@cache
def fetched(name: str) -> tuple[str | None, str | None]:
    """The folder of a hub id, or why there is none."""
    from huggingface_hub import constants, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    try:
        offline = not _reachable(endpoint)
        return str(snapshot_download(name, allow_patterns=FILES, local_files_only=offline, endpoint=endpoint)), None
    except Exception as error:  # whatever a network and a library of its own raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"on a machine with a network: hf download {name} --local-dir DIR"
        return None, f"no folder is called {name}, and the Hugging Face hub does not give it ({reason}); {remedy}"


def _reachable(endpoint: str) -> bool:
    """Whether the hub's host takes connections: its library would try for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE"):
        return False
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
