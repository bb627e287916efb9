"""GGUF, the files of llama.cpp: read as Hugging Face models, and written from checkpoints.

`file` reads the format, `writer` writes it. `architectures` is one table per architecture of llama.cpp's, made of
`entries` of metadata and `forms` of tensors, with `layer_sizes` for layers that differ and `hybrids` for Mamba-2;
both directions read it.
`tokenizer` makes `tokenizer.json` of metadata, `tokenizer_metadata` the reverse, with `pretokenizers` between them.
`source` is a file as a Hugging Face model, `convert` a checkpoint as a file.
"""
