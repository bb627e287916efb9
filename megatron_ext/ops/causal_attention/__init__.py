"""Causal attention of a sequence to itself, heads of queries in groups that share keys and values.

q (b, n, s, d), k and v (b, g, s, d). Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.2;
grouped: Ainslie et al. (arXiv 2305.13245).

    naive.py    the definition
    cpu.py      torch's flash attention forward, and a backward by hand
"""
