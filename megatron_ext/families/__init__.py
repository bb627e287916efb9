"""Kinds of models, each from flags to a description and from that to Megatron's module: what the engine can train.

`family` says what a kind has to know, and has the one that wings derive from; `language_model` is the layer pattern.
"""
