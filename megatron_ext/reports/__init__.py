"""One of each: writer and reader of `metrics.jsonl`, the store of `results.json`, progress, the look of pictures.

`metrics_log` writes `metrics.jsonl` and `metrics_file` reads it, `training_plot` draws it; `results` is `results.json`,
`provenance` what made a number, `yaml_text` YAML, `progress` the bar, `megatron_output` where Megatron's lines go, and
`figures` how every picture looks.
"""
