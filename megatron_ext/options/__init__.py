"""Command lines: our flags from dataclasses (`fields`), Megatron's flags that would do nothing (`unsupported`), and
what Megatron says of wrong ones in words (`readable`)."""
