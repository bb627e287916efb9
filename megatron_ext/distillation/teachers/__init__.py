"""Where a teacher's states come from: beside the student, on ranks of its own, or from a cache.

`teacher` is the checkpoint, `colocated`, `remote` and `cached` are the three ways; `forward` runs a teacher on a layout
of its own, `exchange` carries its states, `rank_split` parts the ranks, `correction` fine-tunes it, `identity` keeps a
run to the teacher that it began with.
"""
