"""Onecurve: one loop, one checkpoint and one loss curve on any number of ranks."""

import os

# PyTorch then asks for huge pages for large CPU tensors: without them page faults take a tenth of a step. Read at its first
# allocation, so it is said before anything imports torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
