"""From hidden states to losses on a split vocabulary, without ever holding the logits.

`hidden_states` ends a model before its output layer; `vocab_parallel` is this rank's share of the vocabulary;
`fused_loss` makes logits a chunk at a time, `losses` compares them (`divergences`, on a GPU `triton_kl`) as `objective`
says; `top_k` keeps the likeliest tokens.
"""
