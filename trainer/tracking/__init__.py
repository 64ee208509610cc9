"""What a run says while it runs: console, metrics.jsonl, W&B, TensorBoard, speed, traces."""
