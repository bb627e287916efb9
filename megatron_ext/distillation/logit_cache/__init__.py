"""A teacher's likeliest next tokens on disk: `write` makes them, `check` compares a run with them, `shards` stores."""
