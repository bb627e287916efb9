"""A student that learns from a frozen teacher: losses, the teacher, and the pair as one Megatron model chunk."""
