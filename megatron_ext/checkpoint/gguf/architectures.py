"""llama.cpp's architectures that models of ours are: their metadata, the form of their tensors, and their class.

Names of tensors are the `gguf` package's own table (`get_tensor_name_map`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.checkpoint.gguf.entries import (
    Biases,
    Check,
    Config,
    Described,
    Entry,
    Heads,
    Number,
    Only,
    Rotary,
    Whole,
)
from megatron_ext.checkpoint.gguf.file import package
from megatron_ext.checkpoint.gguf.forms import MAMBA2, ROTATED_PAIRS, SHIFTED_NORMS, Form
from megatron_ext.checkpoint.gguf.hybrids import HybridLayers, MixerSizes
from megatron_ext.checkpoint.gguf.layer_sizes import LayerSizes
from megatron_ext.checkpoint.huggingface import families
from megatron_ext.checkpoint.huggingface.family import Family
from megatron_ext.checkpoint.huggingface.remote_code import RemoteCodeFamily
from megatron_ext.errors import CheckpointError
from megatron_ext.models.architecture import CONV_KERNEL, Architecture

_AS_IS = Form((), lambda arch, weight: weight, lambda arch, weight: weight)


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of llama.cpp's.

    Attributes:
        name: `general.architecture`.
        classes: The families of ours that it can be; a file becomes the first that reads what the file says.
        entries: Its metadata.
        forms: Its tensors that are stored in another form.
        fixed: Entries of `config.json` that are always so.
        read_by_transformers: Whether transformers reads it from GGUF, as the same class.
    """

    name: str
    classes: tuple[str, ...]
    entries: Sequence[Entry]
    forms: tuple[Form, ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    read_by_transformers: bool = True

    def config(self, given: Described) -> dict[str, Any]:
        """`config.json` of a file's model.

        Raises:
            CheckpointError: The file asks for something that our models cannot be; names the key.
        """
        known = {f"{self.name}.{key}" for entry in self.entries for key in entry.keys}
        for key, value in given.metadata.items():
            if key.startswith(f"{self.name}.") and key not in known:
                raise CheckpointError(
                    f"GGUF: {key} is not supported", got=repr(value)[:200],
                    legal="a model without it; the key may change what the model computes",
                )  # fmt: skip
        values: dict[str, Any] = dict(self.fixed)
        for entry in self.entries:
            values |= entry.read(given)
        values["vocab_size"] = _rows(given)
        values["tie_word_embeddings"] = "output.weight" not in given.tensors
        problems = []
        for name in self.classes:
            family = families.named(name)
            config = _named(family) | values
            try:
                return family.write(family.read(config))
            except CheckpointError as error:
                problems.append(error)
        raise problems[0]

    def form(self, hf: str) -> Form:
        """The form of a tensor."""
        return next((form for form in self.forms if hf.endswith(form.endings)), _AS_IS)

    def names(self, hf: Sequence[str], layers: int) -> dict[str, str]:
        """GGUF's name of each of these tensors.

        Raises:
            CheckpointError: It has none for one of them.
        """
        gguf = package()
        kinds = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(kinds[self.name], layers)
        names = {}
        for name in hf:
            form = self.form(name)
            asked = name if form.renamed is None else name.removesuffix(form.endings[0]) + form.renamed
            found = table.get_name(asked, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise CheckpointError(f"llama.cpp's {self.name!r} has no such tensor", got=name)
            names[name] = found
        return names

    def metadata(self, config: Config) -> dict[str, Any]:
        """Metadata of a model, from its `config.json` as a family writes it anew.

        Raises:
            CheckpointError: llama.cpp cannot run it; says why.
        """
        values: dict[str, Any] = {}
        for entry in self.entries:
            values |= entry.write(config)
        return {f"{self.name}.{key}": value for key, value in values.items()}


def _rows(given: Described) -> int:
    if "token_embd.weight" not in given.tensors:
        raise CheckpointError("GGUF: the tensor 'token_embd.weight' is missing", got=given.path)
    return given.tensors["token_embd.weight"].shape[0]


def _named(family: Family) -> dict[str, Any]:
    if isinstance(family, RemoteCodeFamily):
        return family.entries()
    return {"architectures": [family.name], "model_type": family.model_type}


_CONTEXT = Whole("context_length", "max_position_embeddings")
_LAYERS = Whole("block_count", "num_hidden_layers")
_WIDTH: tuple[Entry, ...] = (
    Whole("embedding_length", "hidden_size"),
    Only({"vocab_size": (), "tensor_data_layout": (), "attention.causal": (True,), "expert_count": (0,),
          "expert_used_count": (0,), "use_parallel_residual": (False,), "pooling_type": (0,)}),
)  # fmt: skip
_SIZES: tuple[Entry, ...] = (_CONTEXT, _LAYERS, *_WIDTH)
_PER_MODEL: tuple[Entry, ...] = (
    Whole("feed_forward_length", "intermediate_size"), Whole("attention.head_count", "num_attention_heads"),
    Whole("attention.head_count_kv", "num_key_value_heads", "attention.head_count"),
)  # fmt: skip
_GATED: tuple[Entry, ...] = (Number("attention.layer_norm_rms_epsilon", "rms_norm_eps"), Rotary())
_BIASES = Biases(attention_bias="attn_q.bias", mlp_bias="ffn_up.bias")
_MIXER: tuple[Entry, ...] = (
    Only({"ssm.conv_kernel": (CONV_KERNEL,)}, {"ssm.conv_kernel": CONV_KERNEL}), Whole("ssm.group_count", "n_groups"),
)  # fmt: skip
_SILU = ("hidden_act", "silu")
_NO_WINDOW = (("use_sliding_window", False),)


ARCHITECTURES = {
    each.name: each
    for each in (
        GgufArchitecture(
            "llama", ("LlamaForCausalLM", "MistralForCausalLM"), (*_SIZES, *_PER_MODEL, Heads(), *_GATED, _BIASES),
            (ROTATED_PAIRS,), (_SILU, ("sliding_window", None)),
        ),
        GgufArchitecture(
            "deci", ("PrunedLlamaForCausalLM", "PrunedMistralForCausalLM"),
            (*_SIZES, LayerSizes(), Heads(), *_GATED, _BIASES),
            (ROTATED_PAIRS,), (_SILU, ("sliding_window", None)), read_by_transformers=False,
        ),
        GgufArchitecture(
            "qwen2", ("Qwen2ForCausalLM",), (*_SIZES, *_PER_MODEL, Heads(), *_GATED), (), (_SILU, *_NO_WINDOW),
        ),
        GgufArchitecture(
            "nemotron", ("NemotronForCausalLM",),
            (*_SIZES, *_PER_MODEL, Heads(partial=True), Rotary(), Number("attention.layer_norm_epsilon", "norm_eps"),
             Biases(attention_bias="attn_output.bias", mlp_bias="ffn_up.bias"),
             Check(lambda config: config["num_attention_heads"] * config["head_dim"] == config["hidden_size"],
                   "its heads do not make up the hidden size", "num_attention_heads", "head_dim", "hidden_size"),
             Check(lambda config: not config["tie_word_embeddings"], "its embeddings are tied", "tie_word_embeddings")),
            (SHIFTED_NORMS,), (("hidden_act", "relu2"),), read_by_transformers=False,
        ),
        GgufArchitecture(
            "mamba2", ("Mamba2ForCausalLM",),
            (_LAYERS, *_WIDTH, *_MIXER, Number("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
             MixerSizes("state_size", "num_heads", "head_dim", expand=True),
             Only({"context_length": (), "feed_forward_length": (0,), "attention.head_count": (0,)},
                  {"context_length": 2**20, "feed_forward_length": 0, "attention.head_count": 0})),
            MAMBA2, read_by_transformers=False,
        ),
        GgufArchitecture(
            "nemotron_h", ("NemotronHForCausalLM",),
            (_CONTEXT, *_WIDTH, *_MIXER, HybridLayers(),
             MixerSizes("ssm_state_size", "mamba_num_heads", "mamba_head_dim"),
             Whole("attention.head_count", "num_attention_heads"), Heads(),
             Number("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
             Only({"attention.layer_norm_epsilon": (), "rope.scaling.finetuned": (), "rope.freq_base": ()},
                  {"attention.layer_norm_epsilon": 1e-5})),
            MAMBA2, read_by_transformers=False,
        ),
        GgufArchitecture(
            "qwen3", ("Qwen3ForCausalLM",), (*_SIZES, *_PER_MODEL, Heads(), *_GATED), (), (_SILU, *_NO_WINDOW),
        ),
    )
}  # fmt: skip


def of_file(given: Described) -> GgufArchitecture:
    """The architecture of a file.

    Raises:
        CheckpointError: It is none that is converted.
    """
    if given.architecture not in ARCHITECTURES:
        raise CheckpointError(
            "this kind of GGUF model is not converted", got=f"general.architecture={given.architecture}",
            legal=", ".join(ARCHITECTURES),
        )  # fmt: skip
    return ARCHITECTURES[given.architecture]


def of_model(arch: Architecture, family: Family) -> GgufArchitecture:
    """What llama.cpp calls a model that is of this family.

    Raises:
        CheckpointError: It has no such models.
    """
    for found in ARCHITECTURES.values():
        if family.name in found.classes:
            return found
    raise CheckpointError(
        "llama.cpp cannot run this model", got=f"{family.name}, layers {arch.pattern}",
        legal=", ".join(name for found in ARCHITECTURES.values() for name in found.classes),
    )  # fmt: skip
