"""Command lines: flags of ours from dataclasses (`fields`), those that go in front of the user's (`early_flags`),
Megatron's that would do nothing (`unsupported`), and what Megatron says of wrong ones in words (`readable`).
"""
