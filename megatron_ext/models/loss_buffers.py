"""Bytes that a language model's loss holds at a time: what it makes its logits by, and what is counted of it."""

CHUNK = {"cpu": 2**26, "cuda": 2**29}
"""Of logits, of teacher and student together: 64 MB; 512 MB, 1,024 tokens of a vocabulary of 128K in 16 bits. For each
chunk the gradient of the weights is read and written once."""

KEPT = {"cpu": 2**27, "cuda": 2**27}
"""Of the output weights' gradient in fp32, up to which it is kept from the forward to the backward pass."""
