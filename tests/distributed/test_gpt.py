"""A GPTModel that Megatron saved says the same in the pattern form, and converted back it is the original."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from run_ranks import run_ranks
from torch import Tensor

from megatron_ext.checkpoint import gpt, layout
from megatron_ext.checkpoint.reader import CheckpointReader
from megatron_ext.models.architecture import Architecture

pytestmark = pytest.mark.filterwarnings("ignore")
SEQUENCE = 16
LLAMA = Architecture(
    pattern="*-*-*-*-", hidden_size=32, padded_vocab_size=96, max_position_embeddings=64, ffn_hidden_size=48,
    num_attention_heads=4, num_query_groups=2, kv_channels=16, mamba_num_heads=8, position_embedding_type="rope",
    rotary_base=500_000, rope_scaling_factor=8.0,
)  # fmt: skip
MIXTURE = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2}
MODELS = {
    "llama": LLAMA,
    "gpt": replace(
        LLAMA, activation="gelu", gated_linear_unit=False, normalization="LayerNorm", add_bias_linear=True,
        rotary_percent=0.5, rotary_base=10000, rope_scaling_factor=None, untie_embeddings_and_output_weights=False,
        num_query_groups=4,
    ),
    "nemotron": replace(
        LLAMA, activation="squared_relu", gated_linear_unit=False, zero_centered_norm=True, normalization="LayerNorm",
        position_embedding_type="none", rope_scaling_factor=None, qk_layernorm=True,
    ),
    "experts": replace(LLAMA, pattern="*E*E*E*E", **MIXTURE),
    "some-experts": replace(LLAMA, pattern="*-*E*-*E", moe_shared_expert_intermediate_size=24, **MIXTURE),
}  # fmt: skip
# How Megatron saves each: flags, tensor and pipeline parallel size.
SAVED: dict[str, tuple[list[str], int, int]] = {
    "llama": ([], 2, 1), "gpt": (["--transformer-impl", "local"], 1, 2), "nemotron": ([], 2, 1),
    "experts": (["--expert-model-parallel-size", "2"], 1, 1), "some-experts": (["--transformer-impl", "local"], 1, 2),
}  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(96, (2, SEQUENCE), generator=torch.Generator().manual_seed(8))


def start(flags: list[str]) -> Any:
    from megatron_ext.conversion.megatron_logits import JOB
    from megatron_ext.training.command_line import parse_command_line
    from megatron_ext.training.forward import start

    own = ["--seq-length", str(SEQUENCE), "--global-batch-size", "2", "--tokenizer-type", "NullTokenizer"]
    started = parse_command_line(JOB, [*flags, *own, "--vocab-size", "95"])
    start(started)
    return started


def save_as_megatron(folder: str, name: str) -> None:
    """Build Megatron's own GPTModel with random weights everywhere and save it as its training loop does."""
    flags, tp, pp = SAVED[name]
    sizes = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    started = start([*MODELS[name].to_flags(), *flags, *sizes])
    args = started.args
    own = gpt.to_args(MODELS[name]) | {"transformer_impl": args.transformer_impl}
    vars(args).update(own, save=folder, no_save_optim=True, no_save_rng=True)
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.training import setup_model_and_optimizer

    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in model[0].named_parameters():
            if "norm" in key or "bias" in key:  # equal on all tensor ranks, as they must be where they are repeated
                noise = torch.randn(value.shape[-1:] or (1,), generator=generator)
                value.add_(0.2 * noise if value.dim() < 2 else 0)
    save_checkpoint(3, model, None, None, 0)


def logits_of(pattern: str, twin: str | None) -> list[Tensor]:
    from megatron_ext.conversion.megatron_logits import megatron_logits

    found = megatron_logits(Path(pattern), [tokens()], None if twin is None else Path(twin))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for the runner to end
    return found


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_are_one_model(tmp_path: Path, name: str) -> None:
    arch = MODELS[name]
    run_ranks(save_as_megatron, 2, str(tmp_path / "saved"), name)
    assert gpt.to_pattern(tmp_path / "saved", tmp_path / "pattern") == arch
    (ours, theirs) = run_ranks(logits_of, 1, str(tmp_path / "pattern"), str(tmp_path / "saved"))[0]
    assert float(ours.abs().max()) > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    gpt.to_gpt(tmp_path / "pattern", tmp_path / "back")
    old, new = CheckpointReader(tmp_path / "saved"), CheckpointReader(tmp_path / "back")
    for key, shape in gpt.tensors(arch).items():
        assert new.shapes[key] == shape
        if key in old.shapes:
            assert torch.equal(old.read(key), new.read(key)), key
    again = run_ranks(logits_of, 1, str(tmp_path / "pattern"), str(tmp_path / "back"))[0][1]
    torch.testing.assert_close(again, theirs, rtol=0, atol=2e-5)
    assert layout.common(new.step.path)["args"].num_layers == len(arch.pattern) // 2
