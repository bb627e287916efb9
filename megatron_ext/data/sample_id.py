"""What a training sample is called: by its content, so that no order, batch size, layout or epoch changes it."""

import hashlib

import torch
from jaxtyping import Int
from torch import Tensor

BYTES = 16


def hash_samples(tokens: Int[Tensor, "b s"], labels: Int[Tensor, "b s"]) -> Int[Tensor, "b 2"]:
    """The 128-bit BLAKE2b hash (RFC 7693) of each sequence, whole: of its tokens and the last label, as int32.

    Args:
        tokens: What the model reads.
        labels: The next token of each.
    """
    windows = torch.cat([tokens, labels[:, -1:]], dim=1).to("cpu", torch.int32).numpy().astype("<i4")
    digests = [hashlib.blake2b(window.tobytes(), digest_size=BYTES).digest() for window in windows]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).view(-1, 2)


def to_hex(sample_id: Int[Tensor, "2"]) -> str:
    """A sample's identity for people: 32 hex digits."""
    return sample_id.cpu().numpy().tobytes().hex()
