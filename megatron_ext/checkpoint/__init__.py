"""What is on disk, read and written as a stream: no model is built, and no tensor is held longer than it takes to move.

`layout` names the parts of a Megatron checkpoint, `reader` and `writer` move its tensors, `stream` carries out a
table of moves (`blocks` of bytes, `ranks` that share the work), `checksums` and `file_checksums` say whether files
are what was written, `tokenizer` whose tokens a checkpoint speaks, `start` what a run begins with and `resume` how it
goes on, `outputs` and `atomic` see to it that files appear whole or not at all. `huggingface/`, `gguf/` and `gpt` are
other forms; `parameters` is that of what each rank has whole.
"""
