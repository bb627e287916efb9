"""The flags of `megatron-ext convert`: known without torch."""

from argparse import ArgumentParser
from pathlib import Path

TYPES = ("float32", "float16", "bfloat16", "q8_0")
FORMATS = "the format of the input: hf, gguf, Megatron in the pattern form of all programs here, or Megatron's GPTModel"


def add_arguments(parser: ArgumentParser) -> None:
    """The subcommand's flags."""
    source = "a Hugging Face directory or ORG/NAME on its hub, a GGUF file, or a checkpoint of Megatron's"
    formats = ("hf", "gguf", "megatron", "gpt")
    parser.add_argument("input", type=Path, help=source)
    parser.add_argument("output", type=Path, help="a new directory")
    parser.add_argument("--from", dest="source", choices=formats, required=True, help=FORMATS)
    parser.add_argument("--to", dest="target", choices=formats, required=True, help="the format of the output")
    types = "the type of the weights, by default the one they have; q8_0 with --to gguf"
    parser.add_argument("--dtype", choices=TYPES, help=types)
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="in place of the model's own")
    parser.add_argument("--verify", action="store_true", help="load both models, compare logits and what they write")
    to = parser.add_argument_group("--to megatron")
    to.add_argument("--pad-vocab-to", type=int, default=1, metavar="N", help="add zero rows up to a multiple of N")
    back = parser.add_argument_group("--to hf, --to gguf")
    like = "take configuration and tokenizer from here, a Hugging Face directory or a checkpoint converted from one"
    back.add_argument("--like", type=Path, metavar="DIR", help=like)
    back.add_argument("--hf-class", metavar="NAME", help="what it is to be, such as LlamaForCausalLM")
    back.add_argument("--vocab-size", type=int, metavar="N", help="rows of the embedding that are words, not padding")
    back.add_argument("--shard-gb", type=float, metavar="GB", help="size of a file of --to hf (default: 5)")
