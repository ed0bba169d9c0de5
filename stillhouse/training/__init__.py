"""Training language models: one order of samples, any number of workers, resumable at any step.

* `task`: a training as plain values, and what `auto` stands for; `spec`, the spec of `job: train`.
* `order`, `fetch`, `stream`: the order of samples, by arithmetic on the parts' row counts; a
  worker's rows of every global batch, read ahead. `online`: batches chosen while it trains.
* `objectives`, `optimisation`: what is minimised, and how.
* `group`: the workers of a training, replicated or sharded.
* `loop`: `Trainer`, one optimiser step at a time; `evaluate`: losses held out and by source.
* `checkpoint`: the state of a training, its checkpoints, and `fit`, which resumes from them.
* `worker`: all of it in each worker; `seen`: which documents a model has seen.
"""
