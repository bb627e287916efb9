"""What is on disk, read and written as a stream: no model is built, and no tensor is held longer than it takes to move.

`layout` names the parts of a Megatron checkpoint, `reader` and `writer` move its tensors, `checksums` says whether they
are what was written, `start` what a run begins with and `resume` how it goes on, `outputs` and `atomic` see to it that
files appear whole or not at all. `huggingface/` and `gpt` are the other forms.
"""
