"""The gated activation of an MLP: silu(a) b of the two halves of what its first linear layer makes.

y (..., 2 f) in, (..., f) out. Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), section 2.

    naive.py    the definition
    cpu.py      blocks of tokens in plain torch, with a backward by hand
"""
