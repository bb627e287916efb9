"""What a model costs to train, on paper: operations, memory of the fullest GPU by component, seconds of a step.

Everything follows from the architecture, the layout and a few figures of the GPU; what is an assumption rather than a
count is a field of `Gpu` or an argument, so that it can be said beside the result. Each kind of layer is counted by
itself. Sizes are per GPU, in bytes.
"""

from argparse import Namespace
from dataclasses import dataclass, replace

from megatron_ext.models import axes
from megatron_ext.models.architecture import Architecture
from megatron_ext.models.cost import parameters_per_rank
from megatron_ext.models.loss_buffers import CHUNK, KEPT
from megatron_ext.models.pattern import ATTENTION, LINEAR, MAMBA, MLP, MOE, parse


@dataclass(frozen=True)
class Gpu:
    """One GPU and what connects it, from its data sheet: dense 16-bit FLOP/s, bytes, bytes/s in one direction.

    Attributes:
        flops: Matrix units in 16 bits, without sparsity.
        memory: Of the device.
        link: To the other GPUs of its node.
        network: To other nodes.
        per_node: GPUs of a node.
    """

    flops: float
    memory: float
    link: float
    network: float
    per_node: int = 8


GPUS = {
    "a100": Gpu(312e12, 80e9, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 450e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 900e9, 50e9),
}


def peak(device: str, half: bool) -> float | None:
    """Operations a second of a device's matrix units by its name; None of one that is not in the table."""
    found = [gpu.flops for name, gpu in GPUS.items() if name.upper() in device.upper()]
    return (found[0] if half else found[0] / 2) if found else None


@dataclass(frozen=True)
class Layout:
    """How a model is divided over GPUs and what each is given.

    Attributes:
        tp: Tensor-parallel size; pp, cp, dp, ep, etp: pipeline, context, data, expert and expert tensor.
        micro_batch: Sequences of a rank at a time.
        global_batch: Sequences of a step.
        seq_length: Tokens of a sequence.
        width: Bytes of a weight and of an activation, 2 or 4.
        gradient_width: Bytes of a gradient.
        shard_optimizer: The optimizer's state is divided over the data-parallel ranks.
        sequence_parallel: Norms and residuals are divided over the tensor ranks.
        recompute: Only the inputs of layers are kept, and each layer runs forward again.
        overlap_gradients: Gradients travel while the backward runs.
        virtual: Model chunks of a pipeline rank.
        fused: Norms, gated activations and the state-space layer are single operations, as on a GPU; in plain torch
            they keep more for their backward.
        norm_apart: The norm after the scan is an operation by itself, as it is with mamba_ssm's kernels, and with ours
            where ranks share a sequence (`platform/mamba_training.py`). `--overlap-param-gather`
            does not part them.
        fused_gradients: Gradients of weights are added where they belong (Transformer Engine, Apex); otherwise each
            is a tensor of its own first.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    seq_length: int = 4096
    width: int = 2
    gradient_width: int = 4
    shard_optimizer: bool = True
    sequence_parallel: bool = False
    recompute: bool = False
    overlap_gradients: bool = False
    virtual: int = 1
    fused: bool = True
    norm_apart: bool = False
    fused_gradients: bool = True

    @classmethod
    def from_args(cls, args: Namespace) -> "Layout":
        """That of Megatron's validated arguments, which are to run on GPUs."""
        half = args.bf16 or args.fp16
        return cls(
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            cp=args.context_parallel_size,
            dp=args.data_parallel_size,
            ep=args.expert_model_parallel_size,
            etp=args.expert_tensor_parallel_size,
            micro_batch=args.micro_batch_size,
            global_batch=args.global_batch_size,
            seq_length=args.seq_length,
            width=2 if half else 4,
            gradient_width=4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2,
            shard_optimizer=args.use_distributed_optimizer,
            sequence_parallel=args.sequence_parallel,
            recompute=args.recompute_granularity == "full",
            overlap_gradients=args.overlap_grad_reduce,
            virtual=args.virtual_pipeline_model_parallel_size or 1,
            norm_apart=args.context_parallel_size > 1 or args.ext_ssm_backend == "mamba_ssm",
            fused_gradients=args.gradient_accumulation_fusion,
        )

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batches(self) -> int:
        """Of a step and rank."""
        return max(1, self.global_batch // (self.micro_batch * self.dp))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch * self.seq_length


@dataclass(frozen=True)
class TeacherSetup:
    """Whom a model learns from, and where that is.

    Attributes:
        teacher: The teacher's model; None if a cache stands for it.
        layout: Of a teacher with a layout of its own: its tensor- and pipeline-parallel size.
        apart: Whether it runs on ranks of its own.
        trained: Whether it is corrected while it teaches.
    """

    teacher: Architecture | None
    layout: tuple[int, int] | None = None
    apart: bool = False
    trained: bool = False


def forward_flops_per_token(arch: Architecture, seq_length: int) -> float:
    """Operations of a forward pass per token, as Megatron counts them.

    Two for each weight of a matrix that the token meets; attention under its causal mask, 2 s per query channel (half
    of both products; with a window of w tokens 2 (2 w - w^2 / s)); the scan of Mamba-2, 7 per channel and state.
    """
    total = 2.0 * arch.padded_vocab_size * arch.hidden_size
    for key, shape in axes.tensors(arch).items():
        if key in (axes.EMBEDDING, axes.OUTPUT_LAYER) or len(shape) < 2 or "conv1d" in key:
            continue
        share = arch.moe_router_topk / arch.num_experts if axes.is_expert(arch, key) else 1.0
        total += 2.0 * axes.size(arch, key) * share
    for layer, unit in enumerate(arch.pattern):
        if unit == ATTENTION:
            window = min(seq_length, arch.window(layer) or seq_length)
            seen = 2 * window - window**2 / seq_length  # twice the mean of the tokens that one sees
            total += 2.0 * seen * arch.num_attention_heads * arch.kv_channels
        elif unit == MAMBA:
            total += 7.0 * arch.at(layer).mamba_inner_size * arch.mamba_state_dim
    return total


def training_flops_per_token(arch: Architecture, seq_length: int) -> float:
    """Forward and backward: three times the forward. What is computed twice to save memory is not counted."""
    return 3 * forward_flops_per_token(arch, seq_length)


def memory(arch: Architecture, layout: Layout, lesson: TeacherSetup | None = None) -> dict[str, float]:
    """Bytes of the fullest pipeline stage's GPU, by component.

    Adam keeps two fp32 moments and, beside 16-bit weights, an fp32 copy. Activations are what each kind of layer keeps
    for its backward (see `kept_per_token`) for the micro-batches that are under way at once (1F1B: as many as stages
    follow), and the logits with their fp32 softmax on the last stage. With a teacher logits are only ever made in
    chunks: `distillation` is such a chunk of both models, the gradients of the states and, where it is small, of the
    output weights, which the loss makes; and of the teacher its weights and its widest layer at work, or all that is
    counted of a model if it is trained. `working` is the gradient of the largest weight before it is added to the
    others. Neither the CUDA context nor what an allocator loses in gaps is counted.
    """
    stages = []
    for stage in range(layout.pp):
        parts = _trained(arch, layout, stage, logits=lesson is None and layout.fused)
        if lesson is None and not layout.fused and stage == layout.pp - 1:
            parts["activations"] += _token_losses(arch, layout)
        if not layout.fused_gradients:
            parts["working"] = float(_largest(arch, layout, stage) * layout.width)
        if lesson is not None:
            parts["distillation"] = _distillation(arch, lesson, layout, stage)
        stages.append(parts)
    return max(stages, key=lambda parts: sum(parts.values()))


def state_bytes(parameters: float, layout: Layout) -> dict[str, float]:
    """Bytes of so many parameters of a rank, their gradients, and Adam's state of them."""
    states = 8 + (4 if layout.width == 2 else 0)
    shards = layout.dp * layout.cp if layout.shard_optimizer else 1
    return {
        "weights": float(parameters * layout.width),
        "gradients": float(parameters * layout.gradient_width),
        "optimizer": parameters * states / shards,
    }


def _trained(arch: Architecture, layout: Layout, stage: int, logits: bool) -> dict[str, float]:
    """What a model that is trained takes on the GPU of a stage."""
    counts = parameters_per_rank(arch, tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    return {**state_bytes(counts[stage], layout), "activations": _activations(arch, layout, stage, logits)}


def kept_per_token(arch: Architecture, layer: int, layout: Layout) -> float:
    """Bytes that a layer keeps of each token for its backward, with the norm before it, on one tensor rank.

    Inputs of matrix products, of norms, of activations and of flash attention; no attention scores, no dropout masks.
    """
    unit, own, tp, width = arch.pattern[layer], arch.at(layer), layout.tp, layout.width
    hidden = arch.hidden_size / (tp if layout.sequence_parallel else 1)
    if unit == LINEAR:  # no norm, and no activation
        return (hidden + arch.linear_rank) * width if arch.linear_rank else 0.0
    # The residual stream as the norm's input, and the norm's output as the first product's.
    kept = 2 * hidden * width
    if unit == ATTENTION:
        heads, groups = arch.num_attention_heads / tp, arch.num_query_groups / tp
        values = 2 * heads + 2 * groups  # query, key, value, output
        if arch.position_embedding_type == "rope":
            values += heads + groups  # rotated; what they were made of lies in one tensor with the value
        kept += values * arch.kv_channels * width + 4 * heads  # and the logarithm of the softmax's sum
    elif unit == MAMBA:
        kept += _mamba(own, layout)
    elif unit == MLP:
        kept += _mlp(own.ffn_hidden_size / tp, arch, layout)
    elif unit == MOE:
        ffn = _mlp(arch.moe_ffn_hidden_size / layout.etp, arch, layout)
        kept += arch.moe_router_topk * (2 * arch.hidden_size * width + ffn)  # sent to the experts, and what comes back
        kept += _mlp(arch.moe_shared_expert_intermediate_size / tp, arch, layout) + 4 * arch.num_experts
    return kept


def _mlp(neurons: float, arch: Architecture, layout: Layout) -> float:
    """Before and after the activation, of which a gated one has two inputs."""
    return neurons * layout.width * (3 if arch.gated_linear_unit else 2)


def _mamba(own: Architecture, layout: Layout) -> float:
    """What the input projection made, y, what the output projection takes, states, and what is small beside them.

    In plain torch (`ops/mamba_mixer/cpu.py`) y and states are in fp32, and decays are kept (`ops/ssd/cpu_decays.py`).
    """
    tp, width = layout.tp, layout.width
    inner, heads, groups = own.mamba_inner_size / tp, own.mamba_num_heads / tp, own.mamba_num_groups / tp
    # the projection, what comes out, and the input of a norm by itself
    outer = 3 * inner + 2 * groups * own.mamba_state_dim + heads + (inner if layout.norm_apart else 0)
    if layout.fused:
        from megatron_ext.ops.ssd.triton_tiling import CHUNK

        return (outer + inner + inner * own.mamba_state_dim / CHUNK) * width + 8 * heads + 4 * groups
    from megatron_ext.ops.ssd import cpu

    states = inner * (own.mamba_state_dim + 1) / cpu.CHUNK * 4
    return outer * width + 4 * inner + states + 28 * heads + 4 * groups


def _activations(arch: Architecture, layout: Layout, stage: int, logits: bool) -> float:
    units = parse(arch.pattern).split(layout.pp).stages
    first = sum(len(each) for each in units[:stage])
    tokens = layout.micro_batch * layout.seq_length / layout.cp
    layers = [kept_per_token(arch, first + i, layout) for i in range(len(units[stage]))]
    in_flight = min(layout.micro_batches, layout.pp - stage)
    last, hidden = 0.0, arch.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    if stage == layout.pp - 1:
        last = 2 * hidden * layout.width  # the last norm
        if logits:  # and, in 16 bits, the softmax in fp32
            last += arch.padded_vocab_size / layout.tp * (4 if layout.width == 4 else layout.width + 4)
    if layout.recompute:  # logits are gone before the first layer runs again
        total = len(layers) * hidden * layout.width * in_flight + max(last, *layers, 0.0)
    else:
        total = sum(layers) * in_flight + last
    return total * tokens


def _largest(arch: Architecture, layout: Layout, stage: int) -> float:
    """Elements of a rank's largest weight."""
    units = parse(arch.pattern).split(layout.pp).stages
    first = sum(len(each) for each in units[:stage])
    own = range(first, first + len(units[stage]))
    sizes = [0]
    for key in axes.tensors(arch):
        layer, _ = axes.locate(arch, key)
        ends = (key == axes.EMBEDDING and stage == 0) or (key == axes.OUTPUT_LAYER and stage == layout.pp - 1)
        if layer in own or (layer is None and ends):
            sizes.append(axes.size(arch, key, tp=layout.tp, ep=layout.ep, etp=layout.etp))
    return max(sizes)


def _distillation(arch: Architecture, lesson: TeacherSetup, layout: Layout, stage: int) -> float:
    """On the GPU of a student's stage."""
    total, teacher = 0.0, lesson.teacher
    if stage == layout.pp - 1:
        total += _loss(arch, lesson, layout)
    if teacher is None:
        return total
    if lesson.trained:
        return total + sum(_trained(teacher, layout, stage, logits=False).values())
    if lesson.layout is None:
        return total + _forward_only(teacher, layout, stage)
    tp, pp = lesson.layout
    own = replace(layout, tp=tp, pp=pp, cp=1, sequence_parallel=False)
    if stage == layout.pp - 1:  # its states of a whole step, and its output rows
        tokens = layout.micro_batches * layout.micro_batch * layout.seq_length / layout.cp
        total += (tokens + arch.padded_vocab_size / layout.tp) * teacher.hidden_size * layout.width
    return total if lesson.apart else total + max(_forward_only(teacher, own, each) for each in range(pp))


def _forward_only(teacher: Architecture, layout: Layout, stage: int) -> float:
    """A frozen model's weights, and its widest layer at work."""
    counts = parameters_per_rank(teacher, tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.etp)
    tokens = layout.micro_batch * layout.seq_length / layout.cp
    working = max(kept_per_token(teacher, layer, layout) for layer in range(len(teacher.pattern))) * tokens
    return counts[stage] * layout.width + working


def _loss(arch: Architecture, lesson: TeacherSetup, layout: Layout) -> float:
    """A chunk of logits of both models, and what is made of the gradients before it is where it belongs."""
    tokens, columns = layout.micro_batch * layout.seq_length / layout.cp, arch.padded_vocab_size / layout.tp
    models = 1 if lesson.teacher is None else 2
    most = CHUNK["cuda" if layout.fused else "cpu"]
    kept = 4 * columns * arch.hidden_size
    logits, states = models * tokens * columns * layout.width, tokens * arch.hidden_size * layout.width
    return min(logits, most) + states + (kept if kept <= KEPT["cuda"] else 0.0)


def _token_losses(arch: Architecture, layout: Layout) -> float:
    """Of a loss without all logits (`lm_head.token_losses`); what is recomputed later takes the place of it."""
    own = _loss(arch, TeacherSetup(None), layout)
    if not layout.recompute:
        return own
    tokens = layout.micro_batch * layout.seq_length / layout.cp
    return max(0.0, own - tokens * max(kept_per_token(arch, layer, layout) for layer in range(len(arch.pattern))))


def step_seconds(
    arch: Architecture, layout: Layout, gpu: Gpu, efficiency: float, teacher: Architecture | None = None
) -> dict[str, float]:
    """Seconds of a step, by cause.

    `compute`: all operations at `efficiency` of the matrix units' peak, with the forward again where it is recomputed.
    `pipeline`: the bubble of 1F1B, (pp - 1) / (micro-batches x virtual chunks) of that (arXiv 2104.04473).
    `tensor`: what tensor parallelism reduces, once forward and once backward per layer, 2 (tp - 1) / tp of the
    activations each. `data`: gradients and weights once over the data-parallel ranks, less what half of the computing
    hides where they overlap. Context and expert parallelism are not counted: their traffic hides behind the products.
    """
    flops = training_flops_per_token(arch, layout.seq_length)
    if layout.recompute:
        flops += forward_flops_per_token(arch, layout.seq_length)
    if teacher is not None:
        flops += forward_flops_per_token(teacher, layout.seq_length)
    peak = gpu.flops if layout.width == 2 else gpu.flops / 2
    compute = layout.tokens * flops / (layout.gpus * peak * efficiency)
    bubble = compute * (layout.pp - 1) / (layout.micro_batches * layout.virtual)

    tokens = layout.tokens / (layout.dp * layout.cp)
    layers = len(arch.pattern) / layout.pp
    reduced = 2 * layers * tokens * arch.hidden_size * layout.width * 2 * (layout.tp - 1) / layout.tp
    tensor = reduced / (gpu.link if layout.tp <= gpu.per_node else gpu.network)

    replicas = layout.dp * layout.cp
    count = max(parameters_per_rank(arch, tp=layout.tp, pp=layout.pp, ep=layout.ep, etp=layout.etp))
    moved = count * (layout.gradient_width + layout.width) * (replicas - 1) / replicas
    data = moved / (gpu.link if layout.gpus <= gpu.per_node else gpu.network)
    if layout.overlap_gradients:
        data = max(0.0, data - compute / 2)
    return {"compute": compute, "pipeline": bubble, "tensor": tensor, "data": data}


def scaled(layout: Layout, gpus: int) -> Layout:
    """The same layout on more or fewer GPUs: as many replicas as fit, and the same sequences per step."""
    return replace(layout, dp=gpus // (layout.tp * layout.pp * layout.cp))
