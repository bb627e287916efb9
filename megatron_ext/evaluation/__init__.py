"""What a model is worth: text, lm-evaluation-harness, synthetic suites, speed, and several models side by side.

`job` is `megatron-ext evaluate`, `measure` the registry of what it can measure (`measures/`, and those of installed
packages), `compare` puts runs (`measured_run`) side by side, `questions` are tasks that pruning asks, too.
"""
