"""Scores, a plan, a smaller checkpoint.

`job`, `options`, `checks`, `report` and `pictures` are the command. `calibration` measures (`importance`, `depth`,
`leave_out`, `shapley`, `magnitude`, `task_scoring`) what `scores` stores; `budget` and `select` make of them a `plan`,
and `apply` cuts.
"""
