"""What no record of a run may have: passwords in URLs, and the values of environment variables."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

ENVIRONMENT_READS: list[str] = []
"""Every environment variable that a value of a configuration was resolved from (``${oc.env:NAME}``), in their order."""


def _environment_variable(*arguments: Any) -> Any:
    ENVIRONMENT_READS.append(str(arguments[0]))
    return oc.env(*arguments)


OmegaConf.register_new_resolver("oc.env", _environment_variable, replace=True)


def without_password(text: str) -> str:
    """A text whose URLs have no user and password (``https://user:password@host``) any more."""
    return re.sub(r"([a-zA-Z][\w+.-]*://)[^\s/?#'\"]+@", r"\1***@", text)


def secret_digest(value: Any, salt: str) -> str:
    """By which a value is known again, not read: slow on purpose (scrypt, RFC 7914), since some secrets are short."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.scrypt(text.encode(errors="surrogatepass"), salt=salt.encode(), n=1 << 14, r=8, p=1, dklen=12).hex()


def written_passwords(words: Iterable[str], where: str) -> Iterator[str]:
    """A sentence for every word of a command line that would bring a password to ``where`` it is written to be run again."""
    for word in words:
        if (shown := without_password(word)) != word:
            key = shown.partition("=")[0]
            yield (
                f"{shown} holds a user or password, which {where} would hold, too; put the URL into an environment variable "
                f"and write {key}='${{oc.env:NAME}}'"
            )
