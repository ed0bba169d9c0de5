"""Mixing auxiliary data while the target model trains: policies, rewards, and the training.

Modules, in the order of the flow:

* `examples`, `preparation`, `arms`: rows of tasks and texts, their parts, endless streams of them.
* `target`, `collation`, `task_loss`, `evaluation`: the few-shot target, batches, losses, choices.
* `policy`, `exp3`, `ucb1`, `odm`, `doremi`, `static`, `uniform`, `loss_scaling`, `replay`: laws.
* `schedule`, `decisions`, `decision_log`, `mixer`: draws, their log, and who owns both.
* `gradients`, `rewards`: gradients by arm, and how alike they are to the target's.
* `plan`, `dealing`, `open_step`, `trainer`, `run`: a step over all workers, and a whole run.
* `settings`, `spec`: what a job's YAML says.
"""
