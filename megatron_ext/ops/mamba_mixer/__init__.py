"""All between a Mamba-2 layer's two projections as one function, `conv_scan_norm`, forward and backward.

    z, xBC, dt = zxbcdt;  x, B, C = conv(xBC);  y = ssd(x, softplus(dt + bias), A, B, C, D);  out = norm(y, z)

zxbcdt (b, l, 2 h p + 2 g n + h) is what the input projection makes, out (b, l, h p) what the output projection takes
(arXiv 2405.21060, section 7). Nothing is split, padded or put together again on the way.

    projection.py   the parts of zxbcdt
    naive.py        unfused: one naive operation after the other
    cpu.py          in blocks that fit the cache, from projection to output while a block is there
    triton.py       the kernels of the three operations, reading and writing the projection in place
"""
