"""`megatron-ext convert --verify`: the proof that two forms of a model compute the same.

The Hugging Face side is transformers' own class, from its `config.json`; Megatron's is built from the arguments that
were saved with the checkpoint. Neither is made from the description that the conversion itself went by.
"""

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.checkpoint import layout
from megatron_ext.checkpoint.gguf import source as gguf
from megatron_ext.checkpoint.huggingface import hf_assets, transformers_model
from megatron_ext.conversion.megatron_logits import megatron_logits
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.pattern import ATTENTION, MAMBA

TOLERANCE = 1e-4
ROUNDING = 0.05  # of the largest logit, where weights were converted to another type
TOKENS = 2048
WRITTEN = 32
_SHORTEST = 64
_WINDOWS = ("sliding_window", "original_max_position_embeddings")
_BYTES = 2**30  # of the largest tensor of a forward pass, in fp32
_CHUNK = 256  # tokens that transformers' state-space layer multiplies at once
_WORK = 10**13  # parameters times tokens: minutes on a few cores
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905, four papers changed what people thought about light, atoms, "
    "motion and mass. def add(a, b): return a + b  # and a comment. Was kostet das? 12 Euro 50."
)


def verify_gguf(file: Path, megatron: Path, tolerance: float = TOLERANCE) -> float:
    """`verify` of a GGUF file, which transformers reads itself.

    Raises:
        ConfigError: transformers does not read such files.
    """
    if not gguf.read_by_transformers(file):
        raise ConfigError(
            "--verify: transformers does not read this model from GGUF", got=file,
            legal="the same model with --to hf, which --verify compares",
        )  # fmt: skip
    with gguf.opened(file) as model:
        return verify(model.folder, megatron, tolerance, file)


def verify(hf: Path, megatron: Path, tolerance: float = TOLERANCE, weights: Path | None = None) -> float:
    """Compare two forms of a model in fp32: logits of random tokens and of text, and what they write.

    Args:
        hf: A directory that transformers loads.
        megatron: A checkpoint.
        tolerance: The largest difference that passes, relative to the largest logit where that is above 1.
        weights: The GGUF file that transformers reads the weights from, if they are not in that directory.

    Returns:
        The largest difference.

    Raises:
        CheckpointError: It is larger than the tolerance, or Megatron would write something else than transformers.
        ConfigError: transformers does not know the layout.
    """
    config = hf_assets.read_config(hf)
    if "model_type" not in config:
        raise ConfigError("--verify: transformers does not load this layout", got=hf, legal="a model of transformers'")
    arch = layout.architecture(layout.find(megatron).path)
    length = _length(arch, config)
    inputs = {"random tokens": _random(config["vocab_size"], length)}
    if (text := _text(hf)) is not None:
        inputs["text"] = text[:, :length]
    new = min(WRITTEN, arch.max_position_embeddings // 2)
    prompt = inputs["random tokens"][:, : arch.max_position_embeddings - new][:, :WRITTEN]
    expected = _ask_transformers(hf, list(inputs.values()), prompt, new, weights)
    logits = megatron_logits(megatron, [*inputs.values(), expected.written])
    largest = _compared(list(inputs), expected.logits, logits[:-1], tolerance)
    _check_written(expected.written, logits[-1][..., : config["vocab_size"]], new, tolerance)
    return largest


def verify_gpt(pattern: Path, twin: Path) -> float:
    """Compare the logits of a checkpoint and of Megatron's own GPTModel in fp32, on random tokens; see `verify`."""
    arch = layout.architecture(layout.find(pattern).path)
    inputs = _random(arch.padded_vocab_size, _length(arch, {}))
    logits, gpt_logits = megatron_logits(pattern, [inputs], twin)
    return _compared(["random tokens"], [gpt_logits], [logits], TOLERANCE)


def _length(arch: Architecture, config: Mapping[str, Any]) -> int:
    """Tokens to compare: the context, or enough to see twice every window that `config.json` names; says if fewer."""
    context = arch.max_position_embeddings
    window = max(_windows(config), default=0)
    wanted = min(context, max(TOKENS, 2 * window))
    most = [_WORK // arch.num_active_parameters(), _BYTES // (4 * arch.padded_vocab_size)]
    if ATTENTION in arch.pattern:
        most.append(isqrt(_BYTES // (4 * arch.num_attention_heads)))
    if MAMBA in arch.pattern:
        most.append(4 * _BYTES // (4 * _CHUNK * arch.mamba_num_heads * arch.mamba_state_dim))
    length = min(wanted, max(_SHORTEST, min(most)))
    message = f"comparing {length:,} tokens of a context of {context:,}"
    if length < min(context, 2 * window):
        message += f": fewer than twice the window of {window:,}, which would take too much time or memory"
    print(message, flush=True)
    return length


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    """Lengths at which what a model computes changes, as its configuration names them."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _windows(value)
        elif name in _WINDOWS and isinstance(value, int):
            yield value


def _random(vocab_size: int, length: int) -> Tensor:
    return torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _text(directory: Path) -> Tensor | None:
    """Tokens of a text (1, s); says so if transformers makes others of it."""
    if not (directory / hf_assets.TOKENIZER).is_file():
        return None
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    own = Tokenizer.from_file(str(directory / hf_assets.TOKENIZER))
    ids = own.encode(TEXT, add_special_tokens=False).ids
    problem = ""
    try:
        read: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if read.encode(TEXT, add_special_tokens=False) != ids:
            problem = f"takes it for a {type(read).__name__} and makes other tokens of a text"
    except Exception as error:  # whatever the first file that it does not like makes transformers raise
        problem = f"cannot read it: {error}"
    if problem:
        right = f"PreTrainedTokenizerFast.from_pretrained({str(directory)!r})"
        print(f"warning: the model's tokenizer is {right}; AutoTokenizer {problem}", flush=True)
    return torch.tensor([own.encode(TEXT).ids])


def _compared(names: list[str], expected: list[Tensor], got: list[Tensor], tolerance: float) -> float:
    largest = 0.0
    for name, left, right in zip(names, expected, got, strict=True):
        difference = float((left - right[..., : left.shape[-1]]).abs().max())
        scale = max(1.0, float(left.abs().max()))
        print(f"{name}: largest difference of logits {difference:.2e}, largest logit {scale:.2f}", flush=True)
        largest = max(largest, difference)
        if not difference <= tolerance * scale:
            raise CheckpointError(
                f"the models differ on {name}", got=f"{difference:.3e}", legal=f"at most {tolerance * scale:.3e}"
            )
    return largest


def _check_written(written: Tensor, logits: Tensor, new: int, tolerance: float) -> None:
    """Check that each token that transformers wrote is Megatron's choice too, but for ties.

    Args:
        written: The prompt and `new` tokens (1, s).
        logits: Megatron's, of the same tokens (1, s, v).
        new: How many tokens.
        tolerance: As in `verify`.
    """
    before = logits[0, -new - 1 : -1]
    behind = before.max(-1).values - before.gather(-1, written[0, -new:, None])[:, 0]
    allowed = 2 * tolerance * max(1.0, float(before.abs().max()))  # two logits, each with its difference
    if not float(behind.max()) <= allowed:
        place = int((behind > allowed).nonzero()[0])
        raise CheckpointError(
            "the models write differently", got=f"token {place + 1} of {new}, {float(behind[place]):.3e} behind",
            legal=f"at most {allowed:.3e}",
        )  # fmt: skip
    print(f"{new} tokens that transformers writes are those that Megatron would", flush=True)


@dataclass(frozen=True)
class _TransformersOutput:
    """What transformers' model says: logits (1, s, v) of each input, and a prompt with its continuation (1, s)."""

    logits: list[Tensor]
    written: Tensor


@torch.no_grad()
def hf_logits(directory: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Logits (b, s, v) of transformers' model in fp32 for each batch of tokens (b, s)."""
    model = transformers_model.load(directory)
    return [model(tokens).logits for tokens in inputs]


@torch.no_grad()
def _ask_transformers(
    directory: Path, inputs: list[Tensor], prompt: Tensor, new: int, weights: Path | None
) -> _TransformersOutput:
    """Logits of each input, and what the model writes greedily, with its cache.

    Raises:
        CheckpointError: It cannot write.
    """
    from transformers import GenerationConfig

    model = transformers_model.load(directory) if weights is None else transformers_model.load_gguf(weights, directory)
    logits = [model(tokens).logits for tokens in inputs]
    if _lift_clamps(model):
        free = [model(tokens).logits for tokens in inputs]
        moved = max(float((left - right).abs().max()) for left, right in zip(logits, free, strict=True))
        logits = free
        if moved:
            print(
                f"transformers clamps time steps below time_step_min={model.config.time_step_min}, Mamba-2 and "
                f"Megatron do not: compared without, which alone moves logits by up to {moved:.2e}",
                flush=True,
            )
    model.generation_config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    try:
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    except Exception as error:  # whatever a class of transformers' raises
        raise CheckpointError(f"transformers cannot write with this model: {error!r}", got=directory) from error
    del model
    gc.collect()
    return _TransformersOutput(logits, written)


def _lift_clamps(model: Any) -> bool:
    """Let Mamba-2 layers take the steps that they were trained with; whether any would have clamped them.

    `NemotronHMamba2Mixer` takes the least step that its bias is initialised to for a limit. Where `config.json` itself
    sets a limit, that is left alone.
    """
    low = (getattr(model.config, "time_step_limit", None) or (0.0, inf))[0]
    clamped = [layer for layer in model.modules() if getattr(layer, "time_step_limit", (low,))[0] > low]
    for layer in clamped:
        layer.time_step_limit = (low, inf)
    return bool(clamped)
