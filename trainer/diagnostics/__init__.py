"""Is the run healthy, will it fit: guard, first step, stragglers, preflight, memory."""
