"""The mixer actor owns the policy and the generator of a mixing run, and writes its log.

Only the first worker of a training calls it; all workers train on what it draws. It restarts empty
after a loss: the training goes back to its checkpoint, which holds the mixer's state.
"""

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import ray

from stillhouse.actors.pool_worker import get_result
from stillhouse.errors import CustomCodeError, StillhouseError
from stillhouse.mixing.mixer import Mixer
from stillhouse.mixing.spec import MixTask


@ray.remote(num_cpus=0, max_restarts=-1)
class MixerActor:
    """Hosts the mixer of one run after another."""

    def call(self, task: MixTask | None, method: str, *arguments: Any) -> Any:
        """Call a method of the hosted mixer; with `task`, of a new one.

        Raises:
            CustomCodeError: the policy raised an error that is not one of Stillhouse's.
        """
        if task is not None:
            self._mixer = Mixer(task)
        try:
            return getattr(self._mixer, method)(*arguments)
        except StillhouseError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise CustomCodeError(
                f"the policy failed in `{last.name}` ({last.filename}:{last.lineno}): "
                f"{type(error).__name__}: {error}"
            ) from None


class RemoteMixer:
    """The mixer of one run on the actor, with the methods of `Mixer`.

    They raise what the mixer raised, or RayActorError if it is gone.
    """

    def __init__(self, actor: Any, task: MixTask) -> None:
        self._actor, self._task = actor, task

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *arguments: Any) -> Any:
        task = self._task if method in ("begin", "resume") else None
        return get_result(self._actor.call.remote(task, method, *arguments))
