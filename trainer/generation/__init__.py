"""From token ids to completions and scores: caches, decoding, sampling, engines."""
