"""DERN: drop the experts that matter least, and give their neurons to those that stay.

An expert's importance is the mean over tokens of its gate, divided by the sum of the token's gates. The score `gate` is
that mean as the gates come to the seam: the same where the family renormalises them over the top-k. Where it does not,
a token whose gates add up to little counts for less than in the paper; the sums hold no gate token by token.
"""

from understudy.methods import Method

DERN = Method(
    name="dern",
    score="gate",
    kind="regroup",
    kinds=("regroup", "drop", "constant"),
    scopes=("layer", "model"),
    paper="DERN: Dropping Experts, Recombining Neurons, arXiv 2509.10377",
)
