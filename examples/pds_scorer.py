"""PDS as a scorer: what a text's weight in training does to a target's loss (Gu et al. 2024).

In a spec, run in this folder (or with it on PYTHONPATH):

    scorer: {import: "pds_scorer:PdsScorer", settings: {hidden_size: 64, num_steps: 50}}

A model trains on weighted sequences, theta_{t+1} = theta_t - eta d/dtheta sum_n gamma_n l(x_n), and
J = sum_{t=1..T} l_target(theta_t) is to become small. With the adjoint's

    lam_t = d l_target(theta_t) + lam_{t+1} - eta H_t lam_{t+1},   lam_T = d l_target(theta_T),

the score of a sequence is -dJ/dgamma_n = sum_t eta d l(x_n, theta_t) . lam_{t+1}: positive where
more of it in training lowers the target's loss. The products are exact for the sequences of the
run itself; for any other, they say what a first bit of it in every step would do.

Here the model is a small one of bytes, warmed up on the pool before the T steps of plain gradient
descent; every `every`-th step counts. The paper's scorer network, which spreads scores of a sample
over a corpus, is left out: every text is scored by the products themselves, one forward and one
tangent pass for each step that counts.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.distillation.adjoint import Descent, FlatModule, Run, adjoint, descend
from stillhouse.errors import DivergedError, InputError
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings

PAD = 256
"""Behind the end of a text shorter than a window."""
_BATCH = 32
SequenceLosses = Callable[[Tensor, Tensor], Tensor]  # theta [P], input_ids [B, T] -> NLL [B]


@dataclass(frozen=True, slots=True)
class PdsRun:
    """The small training whose steps weigh the sequences.

    Attributes:
        losses: mean NLL of every sequence; differentiable twice (eager attention).
        batches: input_ids [B, T] of each step; every sequence has weight 1/B.
        target: input_ids of the target's sequences [D, T].
        learning_rate: eta.
    """

    losses: SequenceLosses
    batches: Sequence[Tensor]
    target: Tensor
    learning_rate: float

    def objective(self, step: int, theta: Tensor) -> Tensor | None:
        """The target's mean loss at theta_t, from t = 1 on."""
        return self.losses(theta, self.target).mean() if step else None

    def descent(self, weights: Sequence[Tensor], like: Tensor) -> Descent:
        """The weighted training, as the adjoint takes it; weights [B] by step."""

        def loss(step: int, theta: Tensor) -> Tensor:
            return (weights[step] * self.losses(theta, self.batches[step])).sum()

        return Descent(loss, torch.tensor(self.learning_rate).to(like))


def uniform_weights(run: PdsRun, like: Tensor) -> list[Tensor]:
    """1/B for every sequence of every step."""
    return [torch.full((len(batch),), 1 / len(batch)).to(like) for batch in run.batches]


def train_for_scores(run: PdsRun, start: Tensor) -> Run:
    """Train from theta_0 = `start` [P] with uniform weights; keeps all T+1 states.

    Raises:
        DivergedError: a loss is NaN or infinite.
    """
    made = descend(run.descent(uniform_weights(run, start), start), start, len(run.batches))
    if not torch.isfinite(made.losses).all():
        raise DivergedError(
            f"the proxy's loss is not finite after {int(torch.isfinite(made.losses).sum())} of "
            f"{len(run.batches)} steps at learning rate {run.learning_rate:g}: lower it"
        )
    return made


def directional(
    losses: SequenceLosses, theta: Tensor, direction: Tensor, input_ids: Tensor
) -> Tensor:
    """d l(x_n, theta) . direction for every sequence [B], by forward differentiation."""
    return torch.func.jvp(lambda point: losses(point, input_ids), (theta,), (direction,))[1]


class PdsScorer:
    """Scores texts by what more of them in a small training does to the target's loss.

    Args:
        hidden_size, num_layers: of the small model.
        window: bytes that it reads at once.
        num_windows: of a text that are scored, evenly spread; their mean is the text's score.
        num_warmup: steps of AdamW at 1e-3 from random weights; the steps that count come after.
        num_steps: T, of gradient descent.
        learning_rate: eta, of those.
        batch_size: windows of the pool in a step.
        num_target: windows of the target that its loss is taken of.
        every: only each such step counts; the sum is scaled up by it (the paper: 10).
        seed: of weights and draws.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        num_layers: int = 2,
        window: int = 128,
        num_windows: int = 4,
        num_warmup: int = 200,
        num_steps: int = 50,
        learning_rate: float = 0.1,
        batch_size: int = 32,
        num_target: int = 128,
        every: int = 10,
        seed: int = 0,
    ) -> None:
        self._window, self._num_windows, self._every = window, num_windows, every
        self._warmup, self._steps, self._rate = num_warmup, num_steps, learning_rate
        self._batch, self._num_target, self._seed = batch_size, num_target, seed
        settings = ModelSettings(hidden_size=hidden_size, num_layers=num_layers)
        model = build_model(
            settings, vocab_size=PAD + 1, sequence_length=window, seed=seed, eos_id=PAD
        )
        model.set_attn_implementation("eager")  # differentiable twice
        self._network = FlatModule(model)
        self._kept: tuple[Tensor, Tensor] | None = None

    def fit(self, target: Iterable[str], pool: Iterable[str]) -> Mapping[str, NDArray[Any]]:
        """`states` theta_t and `directions` lam_{t+1} of the steps that count, [K, P] float32.

        Raises:
            InputError: target or pool hold no text. DivergedError: the learning rate is too high.
        """
        rng = np.random.default_rng(self._seed)
        aims = self._drawn(target, self._num_target, rng, "target")
        count = (self._warmup + self._steps) * self._batch
        batches = self._drawn(pool, count, rng, "pool").split(self._batch)
        start = self._trained(self._network.parameters(), batches[: self._warmup])
        run = PdsRun(self._losses, batches[self._warmup :], aims, self._rate)
        states = train_for_scores(run, start).states
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def visit(step: int, theta: Tensor, weight: Tensor) -> None:
            if step % self._every == 0:
                kept[step] = theta.detach(), weight.detach()

        descent = run.descent(uniform_weights(run, start), start)
        adjoint(descent, states, run.objective, [], visit=visit)
        found = [kept[step] for step in sorted(kept)]
        both = [torch.stack(column).numpy() for column in zip(*found, strict=True)]
        return {"states": both[0], "directions": both[1]}

    def load(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over what `fit` returned."""
        self._kept = torch.tensor(state["states"]), torch.tensor(state["directions"])

    def score(self, texts: list[str]) -> NDArray[Any]:
        """-dJ/dweight of each text; NaN for an empty one."""
        assert self._kept is not None
        windows = [self._spread(text) for text in texts]
        counts = np.array([len(own) for own in windows])
        values = self._values(torch.tensor(np.concatenate(windows), dtype=torch.int64))
        starts = np.cumsum(counts) - counts
        sums = np.add.reduceat(np.append(values, 0.0), starts)  # of an empty text: anything
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    def _values(self, windows: Tensor) -> NDArray[np.float64]:
        """Scores of windows [n, window], always `_BATCH` at a time: none depends on its company."""
        assert self._kept is not None
        if not len(windows):
            return np.zeros(0)
        missing = -len(windows) % _BATCH
        padded = torch.cat([windows, torch.full((missing, self._window), PAD)])
        values = [
            sum(
                (self._rate * self._every) * directional(self._losses, theta, weight, batch)
                for theta, weight in zip(*self._kept, strict=True)
            )
            for batch in padded.split(_BATCH)
        ]
        return torch.cat([torch.as_tensor(v) for v in values]).double().numpy()[: len(windows)]

    def _losses(self, theta: Tensor, windows: Tensor) -> Tensor:
        """Mean NLL [B] of the bytes of windows [B, window] after the first; 0 if there are none."""
        logits = self._network(theta, input_ids=windows, use_cache=False).logits
        log_probs = logits[:, :-1].log_softmax(-1)
        nll = -log_probs.gather(-1, windows[:, 1:, None]).squeeze(-1)
        there = windows[:, 1:] != PAD
        return (nll * there).sum(-1) / there.sum(-1).clamp(min=1)

    def _trained(self, start: Tensor, batches: Sequence[Tensor]) -> Tensor:
        """Weights [P] after a step of AdamW on each batch, from `start`, which is left alone."""
        theta = start.clone().requires_grad_()
        optimiser = torch.optim.AdamW([theta], lr=1e-3)
        for batch in batches:
            optimiser.zero_grad()
            self._losses(theta, batch).mean().backward()
            optimiser.step()
        return theta.detach()

    def _drawn(
        self, texts: Iterable[str], count: int, rng: np.random.Generator, what: str
    ) -> Tensor:
        """`count` random windows [count, window]: a random text, then a random place in it."""
        data = [raw for text in texts if len(raw := text.encode()) > 1]
        if not data:
            raise InputError(f"PDS has no text of the {what} to learn from")
        chosen = rng.integers(len(data), size=count)
        places = rng.random(count)
        rows = [
            self._row(data[i], int(place * max(1, len(data[i]) - self._window + 1)))
            for i, place in zip(chosen, places, strict=True)
        ]
        return torch.tensor(np.stack(rows), dtype=torch.int64)

    def _spread(self, text: str) -> NDArray[np.int64]:
        """Up to `num_windows` windows of a text, from its first bytes to its last."""
        raw = text.encode()
        if len(raw) < 2:
            return np.zeros((0, self._window), np.int64)
        last = max(0, len(raw) - self._window)
        count = min(self._num_windows, -(-len(raw) // self._window))
        starts = [round(i * last / max(1, count - 1)) for i in range(count)]
        return np.stack([self._row(raw, start) for start in starts])

    def _row(self, raw: bytes, start: int) -> NDArray[np.int64]:
        row = np.full(self._window, PAD, np.int64)
        part = raw[start : start + self._window]
        row[: len(part)] = np.frombuffer(part, np.uint8)
        return row
