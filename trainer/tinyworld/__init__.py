"""A generated language with a known optimum, and its tasks."""
