"""`megatron-ext presets`: the named architectures as a table, or as JSON."""

import argparse
import json
from typing import Any

from megatron_ext.models.presets import PRESETS, Preset

PATTERN_SHOWN = 15  # characters of a layer pattern in the table, which fits into 80 columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("--json", action="store_true", help="one JSON object, with whole patterns and architectures")


def main(args: argparse.Namespace) -> None:
    """Print every preset with its number of parameters, counted from the architecture, beside the published one."""
    if args.json:
        print(json.dumps({name: _preset_values(preset) for name, preset in PRESETS.items()}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("preset", no_wrap=True)
    table.add_column("layers", no_wrap=True)
    for name in ("hidden", "parameters", "published", "ref"):
        table.add_column(name, justify="right", no_wrap=True)
    sources: list[str] = []
    for name, preset in PRESETS.items():
        architecture = preset.architecture
        counted, published = _short(architecture.num_parameters()), preset.parameters
        if preset.non_embedding is not None:
            counted += f" ({_short(architecture.num_parameters(embedding=False))})"
            published += f" ({preset.non_embedding})"
        if preset.source not in sources:
            sources.append(preset.source)
        reference = str(1 + sources.index(preset.source))
        layers = _abbreviated(architecture.pattern)
        table.add_row(name, layers, f"{architecture.hidden_size:,}", counted, published, reference)
    console = Console(width=max(80, Console().width))
    console.print(table, markup=False, highlight=False)
    notes = ["layers: M Mamba-2, * attention, - MLP; parameters in brackets: without embeddings"]
    notes += [f"{number} {source}" for number, source in enumerate(sources, start=1)]
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def _preset_values(preset: Preset) -> dict[str, Any]:
    architecture = preset.architecture
    return {
        "architecture": architecture.to_dict(),
        "parameters": architecture.num_parameters(),
        "non_embedding_parameters": architecture.num_parameters(embedding=False),
        "published": preset.parameters,
        "published_non_embedding": preset.non_embedding,
        "source": preset.source,
    }


def _abbreviated(pattern: str) -> str:
    """`*-*-*-*-` as "4 x *-"; a long pattern that does not repeat is cut, with its length in brackets."""
    for length in range(1, len(pattern) // 2 + 1):
        if pattern == pattern[:length] * (len(pattern) // length):
            return f"{len(pattern) // length} x {pattern[:length]}"
    if len(pattern) <= PATTERN_SHOWN:
        return pattern
    ending = f"... ({len(pattern)})"
    return pattern[: PATTERN_SHOWN - len(ending)] + ending


def _short(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
