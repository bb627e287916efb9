"""One of each: the reader of `metrics.jsonl`, the store of `results.json`, progress, the look of every picture."""
