"""Mixing auxiliary data while the target model trains: policies, rewards, and the training.

Modules, in the order of the flow:

* `spec`: what a job's YAML says, and the runs that it makes. `task`: one run.
* `examples`, `preparation`, `arms`: rows of tasks and texts, their parts, endless streams of them.
* `batches`, `evaluation`: batches and their losses; the few-shot target, choices.
* `policy`, and a file each: `exp3`, `ucb1`, `odm`, `doremi`, `static`, `loss_scaling`, `replay`.
* `mixer`, `decisions`: who deals arms by a policy, and the log of it.
* `rewards`, `trainer`, `run`: gradients by arm, a step over all workers, a whole run.

A reward on its way: `trainer` computes it, the actor of `mixer` takes it, the policy learns it.
"""
