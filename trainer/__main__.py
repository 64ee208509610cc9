"""``python -m trainer ...``: as ``onecurve ...``, and ``onecurve train ...`` where the first word is no verb."""

from __future__ import annotations

import sys

from trainer.cli import main

if __name__ == "__main__":
    sys.exit(main(default="train"))
