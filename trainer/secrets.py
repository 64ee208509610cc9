"""What no record of a run may have: passwords in URLs, and the values of environment variables."""

from __future__ import annotations

import re
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
