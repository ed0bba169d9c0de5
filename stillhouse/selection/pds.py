"""PDS as a scorer: `scorer: {import: "stillhouse.selection.pds:PdsScorer"}` (Gu et al. 2024).

A small model of bytes is warmed up on the pool, then takes `num_steps` steps of plain gradient
descent on it. A text's score is how much more of it in every step would have lowered the target's
loss along the way: sum_t eta d l(x, theta_t) . lam_{t+1}, with lam from the adjoint recursion of
`stillhouse.distillation.pds`; every `every`-th step counts. The paper's scorer network, which
spreads scores of a sample over a corpus, is left out: every text is scored by the products
themselves, one forward and one tangent pass for each step that counts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.distillation.adjoint import adjoint
from stillhouse.distillation.functional import FlatModule
from stillhouse.distillation.pds import PdsRun, directional, train_for_scores, uniform_weights
from stillhouse.errors import InputError
from stillhouse.models.causal_lm import build_model
from stillhouse.spec import ModelSettings

PAD = 256
"""Behind the end of a text shorter than a window."""
_BATCH = 32


class PdsScorer:
    """A scorer as `stillhouse.selection.own` takes it.

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
