"""`auto` by values worked out by hand and against published recipes; what a task's name covers."""

from dataclasses import replace

import numpy as np
import pytest
from trainings import train_task

from stillhouse.fingerprint import fingerprint
from stillhouse.spec import Optimisation
from stillhouse.training.schedule import Schedule, Share
from stillhouse.training.task import StartModel, TokenSet, choose


def auto_rate(width, start="fresh"):
    chosen = choose(Optimisation(), width=width, num_tokens=1, sequence_length=1, start=start)
    return chosen.peak_rate


@pytest.mark.parametrize(
    ("width", "rate"), [(32, 4e-3), (64, 2.8e-3), (128, 2e-3), (256, 1.4e-3), (1024, 4.9e-4)]
)
def test_rate_falls_with_the_root_of_the_width_and_then_with_the_width(width, rate):
    assert auto_rate(width) == rate


def test_rate_of_a_model_that_continues():
    assert auto_rate(128, "trained") == 2e-3
    assert auto_rate(128, "given") == 2e-4
    assert auto_rate(4096, "given") == 1.2e-5


@pytest.mark.parametrize(
    ("width", "published"), [(768, 6e-4), (1536, 2.5e-4), (2048, 2e-4), (4096, 1.2e-4)]
)
def test_rate_of_large_models_is_near_gpt_3s(width, published):
    """Brown et al. (2020), table 2.1: within a third."""
    assert published / 1.34 < auto_rate(width) < published * 1.34


@pytest.mark.parametrize(
    ("num_tokens", "length", "batch"),
    [
        (1e6, 128, 8),  # 1,024 tokens
        (4e6, 128, 16),  # twice as many
        (1e4, 128, 8),  # never fewer
        (1e8, 128, 64),  # 10,240 tokens are 80 sequences: 64 is nearer than 128, in ratio
        (3e11, 2048, 256),  # 561 k tokens are 274 sequences
    ],
)
def test_batch_grows_with_the_root_of_the_tokens(num_tokens, length, batch):
    chosen = choose(Optimisation(), width=64, num_tokens=num_tokens, sequence_length=length)
    assert chosen.batch_size == batch


def test_only_auto_is_replaced():
    asked = Optimisation(learning_rate=1e-3, warmup=0.5)
    chosen = choose(asked, width=128, num_tokens=4e6, sequence_length=128)
    assert (chosen.peak_rate, chosen.batch_size, chosen.warmup) == (1e-3, 16, 0.5)
    chosen = choose(Optimisation(global_batch=3), width=128, num_tokens=4e6, sequence_length=128)
    assert (chosen.peak_rate, chosen.batch_size) == (2e-3, 3)


def test_a_data_set_is_named_by_what_it_gives():
    """A limit that only refuses does not rename it; the plain name is of lists, written out."""
    data = TokenSet("pool", ("a", "b"), (20, 12), ("1" * 64, "2" * 64), 6)
    plain = fingerprint(["token set", ["1" * 64, "2" * 64], [20, 12], [], 6, 1.0])
    assert data.identity() == plain
    assert replace(data, share=Share(1.0, 2.0)).identity() == plain
    points = ((0.0, 1.0), (0.5, 0.0))
    shares = [Share(2.0), Share(1.0, 2.0, True), Share(1.0, 3.0, True), Share(Schedule(points))]
    shares.append(Share(Schedule(points, linear=True)))
    names = [replace(data, share=share).identity() for share in shares]
    assert len({plain, *names}) == 6


def test_the_name_covers_what_decides_the_weights(untrained):
    data = TokenSet("pool", ("a", "b"), (20, 12), ("1" * 64, "2" * 64), 6)

    def task(data=data, **settings):
        return train_task(data, untrained["tokenizer"]["path"], 12, settings=settings)

    base = task()
    elsewhere = replace(data, uris=("c", "d"), name="x", tokens="y")
    init = StartModel("f", "c" * 64)
    for equal in (
        replace(base, label="x", gpus=1, device="cuda", tokenizer="copy"),
        task(elsewhere, keep_last=0, checkpoint_every=7, activation_checkpointing=True),
    ):
        assert equal.fingerprint == base.fingerprint
    others = [
        replace(base, role="prior"),
        replace(base, num_steps=13),
        replace(base, vocab_size=301, tokenizer_digest="b" * 64),
        replace(base, heldout=data),
        replace(base, init=init),
        replace(base, init=StartModel("f", "d" * 64)),
        replace(base, init=StartModel("f", "d" * 64, fresh=True)),
        replace(base, init=replace(init, moments="e" * 64)),
        replace(base, bos_id=1),
        task(seed=1),
        task(warmup=0.3),
        task(z_loss=0.5),
        task(objective={"name": "cross_entropy", "z_loss": 0.7}),
        task(replace(data, share=Share(2.0))),
        task(replace(data, chosen=(np.arange(20), np.arange(12)))),
    ]
    names = {other.fingerprint for other in (base, *others)}
    assert len(names) == 1 + len(others)
    assert (
        replace(base, init=replace(init, folder="elsewhere")).fingerprint
        == replace(base, init=init).fingerprint
    )
