"""The Hugging Face hub: an id stands for the folder that a model is downloaded to, or for a split of a data set."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from trainer.config import InputError, RunError
from trainer.data.files import DataError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPLIT = re.compile(rf"({ID.pattern})(?:(?::([\w.-]+))?:([\w.-]+))?")
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What of a model is fetched: no pickles, and no weights in other formats."""
ENDPOINT = "https://huggingface.co"
CONNECT_SECONDS = 3.0


class HubError(RunError):
    """The hub does not answer now, and what is asked of it is not in the cache."""


def folder_of(path: str) -> str:
    """The folder of a hub id (owner/name) in Hugging Face's own cache, downloaded if need be; any other path as it is."""
    return path if Path(path).exists() or not ID.fullmatch(path) else fetched(path)[0] or path


def absence(path: str) -> str | None:
    """Why a hub id has no folder, in words; None for what exists, or is no id.

    Raises:
        HubError: if the hub does not answer.
    """
    absent = None if Path(path).exists() or not ID.fullmatch(path) else fetched(path)[1]
    # A name in a folder that is there is that of a folder, whatever the hub has.
    if absent and not Path(path).parent.is_dir() and _unreachable():
        raise HubError(f"{absent}; where the network comes back, the same command goes on")
    return absent


def local_folder(path: str | Path) -> Path:
    """The folder of a model that a command names: a hub id's, or the path itself.

    Raises:
        InputError: if it is a hub id that has none.
    """
    if absent := absence(str(path)):
        raise InputError(absent)
    return Path(folder_of(str(path)))


class HubSplit(NamedTuple):
    """What a run reads of a data set of the hub.

    ``name``: owner/name.
    ``configuration``: one of those that the data set has; None = its only one.
    ``split``: None = the one that a folder's rules choose.
    """

    name: str
    configuration: str | None
    split: str | None

    def splits(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        """The rows of every split, downloaded, or from Hugging Face's own cache.

        Raises:
            DataError: if they do not come.
            HubError: if the hub does not answer.
        """
        import datasets

        before = datasets.config.HF_HUB_OFFLINE
        try:
            datasets.config.HF_HUB_OFFLINE = before or not _reachable(_endpoint())
            return dict(datasets.load_dataset(self.name, self.configuration))
        except Exception as error:  # whatever a network and a library of its own raise
            reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__  # the second one lists configurations
            remedy = "is it owner/name, owner/name:split or owner/name:configuration:split, and is there a network?"
            kind = DataError if before or not _unreachable() else HubError
            raise kind(
                f"{self.name} does not come from the hub ({reason}); {remedy} A downloaded folder is read as well"
            ) from None
        finally:
            datasets.config.HF_HUB_OFFLINE = before


def hub_split(path: str) -> HubSplit | None:
    """What ``owner/name``, ``owner/name:split`` or ``owner/name:configuration:split`` means; None for anything else."""
    match = SPLIT.fullmatch(path)
    return None if match is None else HubSplit(*match.groups())


@cache
def fetched(name: str) -> tuple[str | None, str | None]:
    """The folder of a hub id, or why there is none."""
    from huggingface_hub import snapshot_download

    endpoint = _endpoint()
    try:
        offline = not _reachable(endpoint)
        return str(snapshot_download(name, allow_patterns=FILES, local_files_only=offline, endpoint=endpoint)), None
    except Exception as error:  # whatever a network and a library of its own raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = f"on a machine with a network: hf download {name} --local-dir DIR"
        return None, f"no folder is called {name}, and the Hugging Face hub does not give it ({reason}); {remedy}"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", ENDPOINT)


def _unreachable() -> bool:
    """Whether the hub does not answer, and nobody said that it is not to be asked."""
    return not os.environ.get("HF_HUB_OFFLINE") and not _reachable(_endpoint())


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
