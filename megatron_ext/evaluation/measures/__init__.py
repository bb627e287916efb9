"""The measures of `megatron-ext evaluate`, each with its flags, rows and pictures: `measure.MeasureKind`.

`text` is perplexity, `tasks` lm-evaluation-harness, `synthetic` questions about long contexts, `speed` tokens per
second, `images` what `megatron-ext vision evaluate` finds; `scoring` shows how far many texts are scored.
"""
