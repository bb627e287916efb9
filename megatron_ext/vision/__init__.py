"""MambaVision: image backbones of convolutions, selective-scan mixers and attention, on a CPU and on a GPU.

What is in it:

    architecture.py   a network as one value: pattern, sizes, parameters, operations
    presets.py        the published networks T, T2, S, B, L, L2, L3, and a tiny one
    linears.py        linear layers, plain or split over tensor-parallel ranks
    mixer.py          the mixer, in four arms; attention
    blocks.py         convolution and token blocks, windows, drop path, batch norm
    network.py        the whole: stem, stages, features at strides 4, 8, 16 and 32, classifier
    weights.py        weights in the layout of the published checkpoints
    job.py            megatron-ext vision; options.py are its flags, checks.py what can be wrong, task.py its losses
    distillation.py   megatron-ext distill, of image networks
    pruning/          megatron-ext prune, of image networks
    sources.py        folders, tar and parquet files; images.py makes samples of them
    family.py         the network on Megatron; checkpoint.py reads a trained one
    beginning.py      what a new run begins from: another run, its average, published weights
    average.py        the moving average of weights; agreement.py the agreement with its predictions (MESA)
    lamb.py           LAMB in Megatron's loop; layer_decay.py learning rates by depth
    loading.py        the network of a command, from a checkpoint or a published file; command_options.py its flags
    evaluate.py       top-1, top-5 and loss; predict.py classes of pictures; export.py ONNX and torch.export
    timm_models.py    import it, and `timm.create_model("mambavision_tiny")` works; needs megatron-ext[vision]
    downstream/       what segmentation and detection share: backbones with heads, samples, a small set
    segmentation/     megatron-ext vision-segment: UPerNet
    detection/        megatron-ext vision-detect: R-CNN
"""
