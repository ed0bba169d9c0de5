"""A ranking rule: the drop of the loss relative to where it began.

In a spec, run in this folder (or with it on PYTHONPATH):

    selection: {tau: 8, rule: "relative_drop:RelativeDrop"}

CoLoR-Filter ranks by S_prior - S_conditional, in nats a token. Text that is hard for both models
has larger differences; this rule divides by S_prior.
"""

from collections.abc import Mapping

from stillhouse.selection.rules import RankedRows, Values


class RelativeDrop:
    """(S_prior - S_conditional) / S_prior."""

    scorers = ("prior", "conditional")

    def values(self, scores: Mapping[str, Values], rows: RankedRows) -> Values:
        """float32 [n], of float32 [n] losses in nats a token."""
        return (scores["prior"] - scores["conditional"]) / scores["prior"]
