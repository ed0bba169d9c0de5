"""The mixer actor owns the policy and the generator of a mixing run, and writes its log.

The first worker of a training speaks to it; all workers train on what it deals. It comes back
empty after a loss: the training begins again at its checkpoint, which holds the mixer's state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ray

from stillhouse.actors.results import get_result
from stillhouse.mixing import mixer


@ray.remote(num_cpus=0, max_restarts=-1)
class MixerActor:
    """Hosts the mixer of one run after another."""

    def call(self, task: mixer.MixerTask | None, method: str, *arguments: Any) -> Any:
        """Call a method of the hosted mixer; with `task`, of a new one."""
        if task is not None:
            self._mixer = mixer.Mixer(task)
        return getattr(self._mixer, method)(*arguments)


class RemoteMixer:
    """A `MixerHandle` on the actor, for one run.

    Raises:
        StillhouseError: what the mixer raised. RayActorError: it is gone.
    """

    def __init__(self, actor: Any, task: mixer.MixerTask) -> None:
        self._actor, self._task = actor, task

    def begin(self, initial_rewards: Sequence[float]) -> None:
        """Start a run."""
        self._call(self._task, "begin", list(initial_rewards))

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self._call(self._task, "resume", state)

    def deal(self) -> mixer.Draw:
        """The next step's draws."""
        return self._call(None, "deal")

    def learn(self, rewards: Mapping[int, float]) -> list[str]:
        """End the step."""
        return self._call(None, "learn", dict(rewards))

    def checkpoint(self) -> dict[str, Any]:
        """Write the log so far; the state."""
        return self._call(None, "checkpoint")

    def summary(self) -> dict[str, Any]:
        """What was drawn."""
        return self._call(None, "summary")

    def _call(self, task: mixer.MixerTask | None, method: str, *arguments: Any) -> Any:
        return get_result(self._actor.call.remote(task, method, *arguments))
