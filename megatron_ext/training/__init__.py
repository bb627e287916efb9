"""The engine: from a command line to a run in Megatron's own loop. It knows nothing of the jobs that use it.

Read in this order: `job` (what a command is), `run_job`, `command_line` (parsing and every check), `step` (what is
trained and measured), `loop` and `validation` (training, `--skip-train`), `forward` (passes without training),
`dry_run`, `run_directory` and `signals` (how a run is stopped). What a model is, `families` says.
"""
