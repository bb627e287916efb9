"""Rotary position embedding: channels in pairs, turned by angles that grow with the position.

Channel i of a head's first r / 2 is paired with channel i + r / 2, or each with its neighbour; the channels after the
first r stay as they are.
t (s, b, n, d), angles (s, 1, 1, r). Su et al., "RoFormer" (arXiv 2104.09864), equation 34.

    naive.py    the definition, with a rotation matrix for each pair
    cpu.py      two products for each half in plain torch, with a backward by hand
"""
