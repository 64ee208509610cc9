"""Onecurve: one loop, one checkpoint and one loss curve on any number of ranks."""
