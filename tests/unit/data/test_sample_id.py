"""A sample is called by its content."""

import hashlib
import struct

import torch

from megatron_ext.data.sample_id import hash_samples, to_hex

B, S, V = 3, 5, 40


def test_an_identity_is_of_the_content_and_nothing_else() -> None:
    drawn = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(4))
    read, labels = drawn[:, :-1].clone(), drawn[:, 1:].clone()
    ids = hash_samples(read, labels)
    window = [*read[1].tolist(), int(labels[1, -1])]
    assert to_hex(ids[1]) == hashlib.blake2b(struct.pack(f"<{S + 1}i", *window), digest_size=16).hexdigest()
    assert hash_samples(read[[2, 1]].int(), labels[[2, 1]].int()).equal(ids[[2, 1]])
    for changed in (read, labels):
        changed[0, -1] = (changed[0, -1] + 1) % V
        other = hash_samples(read, labels)
        assert not other[0].equal(ids[0])
        assert other[1:].equal(ids[1:])
        ids = other
