"""What a model is worth: text, lm-evaluation-harness, synthetic suites, speed, and several models side by side.

`job` is `megatron-ext evaluate`, `options` its flags, `measure` the registry of what it can measure (`measures/`, and
those of installed packages). `perplexity` and `synthetic/` are ours; of lm-evaluation-harness `tasks` loads tasks,
`harness` runs them, `generation` has their settings, and `request_cache` what was answered before an interruption.
`questions` are tasks that pruning asks, too. `compare` puts runs (`measured_run`) side by side: `compare_rows` of
`rows`, `compare_plot` of `panels`.
"""
