"""``python -m trainer ...``: as ``onecurve ...``, and ``onecurve train ...`` where the first word is no verb."""

from __future__ import annotations

import sys

from trainer import stopping

if __name__ == "__main__":
    # A scheduler's signal may come while torch is imported, and must not end the process then.
    stopping.listen()

    from trainer.cli import main

    sys.exit(main(default="train"))
