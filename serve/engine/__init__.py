"""The native engine: one scheduling rule, a paged KV cache, one forward pass over a mixed batch a step.

Read `requests`, `blocks`, `scheduler` (plain Python, no tensors), then `pages`, `runner`, `sampler`, `detokenizer`, and
`engine`, which is the loop over them. `process` runs that loop in a process of its own, `llm` runs it in yours.
"""
