"""From hidden states to losses and log-probabilities on a split vocabulary, without ever holding the logits.

`naive` says what everything here computes, as the papers write it and over whole logits: read it first. Forward KL is
`naive.kl`, and on a split vocabulary with its gradient `divergences.forward_kl`.

`hidden_states` ends a model before its output layer; `vocab_parallel` is this rank's share of the vocabulary;
`losses` compares logits as `objective` says (by `divergences`, on a GPU by `triton_kl`), and `fused_loss` makes them a
chunk at a time; `token_losses` are those of plain training on a CPU; `log_probabilities` scores given tokens;
`logit_distance` says how far logits are from others; `top_k` keeps the likeliest; `softcap` bounds logits.
"""
