"""The samples of a step, one by one: slow and plain."""

import numpy as np

from stillhouse.training.order import NO_SAMPLES, chain


def step_samples(order, step, rank=0, num_workers=1):
    """The samples of a worker's rows of a step."""
    found = []
    for lane in order.lanes_of(rank, num_workers):
        first = step * order.rows_per_lane
        for dataset, position in zip(
            *order.mixture.draws(lane, first, order.rows_per_lane), strict=True
        ):
            window = order.window_at(int(dataset), lane, int(position))
            row = window.permutation()[position - window.start]
            found.append(tuple(window.samples()[row].tolist()))
    return found


def order_digest(order, num_steps):
    """`order_sha256` of so many steps."""
    state = NO_SAMPLES
    for step in range(num_steps):
        state = chain(state, np.array(step_samples(order, step)))
    return state.hex()
