"""Mixing auxiliary data while the target model trains: policies, rewards, and the training.

* `spec`: a job's settings and the runs it makes. `preparation`: rows of files as token parts.
* `policy`, and a file for each paper: `flad`, `odm`, `doremi`; `static`; `decisions`: the log and
  its replay. `mixer`: draws arms by a policy.
* `arms`, `batches`: rows of arms and of the target, their batches and losses, evaluation.
* `rewards`, `trainer`, `run`: gradients by arm, a step over all workers, a whole run.

The path of a reward: `trainer` computes it, the actor that hosts `mixer` receives it, the policy
learns it.
"""
