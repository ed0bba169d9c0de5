"""What modules that are moving to `stillhouse.pipelines.steps` still take from here."""

import logging

from stillhouse.pipelines.pool import as_error
from stillhouse.pipelines.steps import run_tasks

__all__ = ["as_error", "quiet", "run_tasks"]


def quiet() -> None:
    """Our own progress is shown instead of Ray Data's; a failing part is our own error."""
    from ray.data import DataContext

    for name in [n for n in logging.root.manager.loggerDict if n.startswith("ray.data")]:
        logging.getLogger(name).setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
