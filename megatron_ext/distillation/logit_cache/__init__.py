"""A teacher's likeliest next tokens on disk, so that a student learns without the teacher in memory.

`write` makes a cache and `check` compares a run with one, `cache` finds it, `manifest` is what it says of itself, and
`shards` stores the samples.
"""
