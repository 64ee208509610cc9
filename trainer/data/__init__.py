"""Text to rows of tokens: tokenizers, sources, packing, loaders, and tiny world."""
