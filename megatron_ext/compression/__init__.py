"""From a Hugging Face model to a smaller one in one command: convert, score, cut, distil, measure, convert back.

`options` are the flags of `megatron-ext compress`, `stages` the commands that they become, `recipe` the same as a file
that can be edited and replayed, `checks` what is found out before the first of them runs, `report` what came out;
`job` puts them together. Every stage is a command of its own, which `workflow` runs.
"""
