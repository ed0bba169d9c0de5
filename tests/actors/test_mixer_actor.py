"""The mixer on its actor: errors of a policy are told, and end a run at once."""

import pytest
from mixing_world import mix_task

from stillhouse.actors.mixer import MixerActor, RemoteMixer
from stillhouse.errors import CustomCodeError, InputError
from stillhouse.mixing.arms import ArmPart
from stillhouse.mixing.decisions import Replay
from stillhouse.mixing.flad import Exp3
from stillhouse.storage.artifact import Store


def test_errors_keep_their_message(ray_cluster, tmp_path):
    store, parts = Store(str(tmp_path)), [ArmPart(name, "", 1) for name in "ab"]
    actor = MixerActor.remote()
    task = mix_task(tmp_path, store, parts, "", policy=Exp3(name="exp3"))
    mixer = RemoteMixer(actor, task)
    mixer.begin([])
    assert len(mixer.draw().arms) == 4
    says = r"failed in `smooth` \(.*policy\.py:\d+\): IndexError: "
    with pytest.raises(CustomCodeError, match=says):
        mixer.learn({9: 0.5})  # an arm that is not there
    gone = Replay(name="replay", log=str(tmp_path / "gone"))
    other = RemoteMixer(actor, mix_task(tmp_path, store, parts, "", policy=gone))
    with pytest.raises(InputError, match="holds no log of decisions"):
        other.begin([])
