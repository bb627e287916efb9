"""Command lines: flags of ours from dataclasses (`fields`), those that go in front of the user's (`early_flags`),
Megatron's that would do nothing (`unsupported`), numbers that a flag cannot have (`numbers`), and what Megatron says of
wrong ones in words (`readable`); what `--help` says (`help`).
"""
