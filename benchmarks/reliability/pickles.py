"""Pickles, written byte by byte, that call what they name when they are loaded."""


def word(text: str) -> bytes:
    """A string for protocol 4."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def unicode(text: str) -> bytes:
    """A string for protocol 2."""
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def calls(module: str, name: str, argument: str) -> bytes:
    """A pickle of protocol 4 that calls what `name`, with dots in it, reaches from `module`."""
    return b"\x80\x04" + word(module) + word(name) + b"\x93" + word(argument) + b"\x85R."


def calls_in_2(module: str, name: str, argument: str) -> bytes:
    """The same in protocol 2, the one of `torch.save`, which takes no dots."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + unicode(argument) + b"\x85R."
