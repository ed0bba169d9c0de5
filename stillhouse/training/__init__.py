"""Training language models: one order of samples, any number of workers, resumable at any step.

Modules, in the order of the flow:

* `task`: what a training is, as plain values; `files`, what its data hold.
* `mixture`, `order`: which sample comes when, by arithmetic on the parts' row counts.
* `fetch`, `stream`: a worker's rows of every global batch, read ahead from the store.
* `online`: scorers that choose the batches while it trains.
* `objectives`, `optimisation`, `recipe`: what is minimised, AdamW and its learning rates.
* `group`: the workers of a training, replicated or sharded.
* `loop`: `Trainer`, one optimiser step at a time.
* `divergence`, `throughput`, `evaluate`, `history`: what is watched and measured.
* `state`, `checkpoint`, `fit`: the state, its checkpoints, and a training between them.
* `worker`: all of it in each worker; `seen`: which documents the model has seen.
"""
