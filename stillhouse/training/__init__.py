"""Training language models: one order of samples, any number of workers, resumable at any step.

Modules, in the order of the flow:

* `mixture`, `order`: which sample comes when, by arithmetic on the parts' row counts.
* `fetch`, `stream`: a worker's rows of every global batch, read ahead from the store.
* `batches`: what a source of batches is, and sequences in memory.
* `cross_entropy`, `optimisation`: the loss, AdamW and its learning rates.
* `group`: the workers of a training, replicated or sharded.
* `loop`: `Trainer`, one optimiser step at a time.
* `divergence`, `throughput`, `source_loss`, `evaluate`: what is watched and measured.
* `state`, `checkpoint`, `fit`: the state, its checkpoints, and a training between them.
* `job`: one training on sequences in memory, as a task.
"""
