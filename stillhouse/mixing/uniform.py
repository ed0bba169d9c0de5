"""Every arm alike: FLAD's explore-only baseline."""

import numpy as np

from stillhouse.mixing.static import Static


class Uniform(Static):
    """The static law 1 / K."""

    def __init__(self, num_arms: int) -> None:
        super().__init__(np.ones(num_arms))
