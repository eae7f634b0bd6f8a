"""`vlm-fix recommend`: which method, at which strength, for a model and its data, proven on data that the search has not seen.

`api` is what Python and the command line call. `candidates` lists what the model can be wrapped with, `data` the images,
`measure` asks about them, `objective` says what is better, `search` finds and proves it, `ledger` keeps every step, `figures`,
`page` and `live` tell what was found.
"""
