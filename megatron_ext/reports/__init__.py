"""One of each: writer and reader of `metrics.jsonl`, the store of `results.json`, progress, the look of pictures."""
