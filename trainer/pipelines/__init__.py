"""One file a pipeline: which models, which batches, which loss."""
