"""How well the impressions of each user are ordered: NDCG, DCG and Recall of the first k, from one sort."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from escm2rec.evaluation.metrics import Floats, as_floats, mean

NDCG_AT = (5,)
DCG_AT = RECALL_AT = (2, 4, 6)
"""Cut-offs that are usual for Coat and Yahoo! R3: DCG and Recall as in Saito, RecSys 2020, and Guo et al. (MRDR), SIGIR 2021."""
RANKING_METRICS = (*(f"ndcg_at_{k}" for k in NDCG_AT), *(f"dcg_at_{k}" for k in DCG_AT), *(f"recall_at_{k}" for k in RECALL_AT))


class UserRanking(NamedTuple):
    """Means over users, by the names of RANKING_METRICS (NaN without any), and how many users they are of."""

    values: dict[str, float]
    users_used: int
    users_without_positive: int


def rank_by_user(users: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> UserRanking:
    """NDCG@k, DCG@k and Recall@k of B rows, ordered within each user (a number a row) by falling score.

    With y_i in {0, 1} the label at position i = 1, 2, ... of a user's rows, and P = sum_i y_i:

        DCG@k    = sum_{i <= k} y_i / log2(i + 1)
        NDCG@k   = DCG@k / sum_{i <= min(k, P)} 1 / log2(i + 1)
        Recall@k = sum_{i <= k} y_i / P

    each averaged over the users with P > 0: the others score 0 in any order, or have no value. Source: Järvelin and Kekäläinen, "Cumulated
    Gain-Based Evaluation of IR Techniques", TOIS 2002. Equal scores have no order, so a metric is its expectation over all orders of
    them: each of n equal scores with m positives counts m / n (McSherry and Najork, "Computing Information Retrieval Performance Measures
    Efficiently in the Presence of Tied Scores", ECIR 2008). The order of the rows is no matter. O(B log B).
    """
    user, score, label = np.asarray(users), as_floats(scores), as_floats(labels)
    if user.size == 0:
        return UserRanking(dict.fromkeys(RANKING_METRICS, float("nan")), 0, 0)
    order = np.lexsort((-score, user))
    user, score, label = user[order], score[order], label[order]
    is_user = np.append(True, user[1:] != user[:-1])  # first row of a user
    is_tie = is_user | np.append(True, score[1:] != score[:-1])  # first row of equal scores
    starts, ties = np.flatnonzero(is_user), np.flatnonzero(is_tie)
    sizes = np.diff(np.append(ties, user.size))
    gain = np.add.reduceat(label, ties) / sizes
    owner = np.cumsum(is_user)[ties] - 1
    above = ties - starts[owner]  # rows of the user with a higher score
    positives = np.add.reduceat(label, starts)
    used = positives > 0

    def first(k: int, cumulated: Floats) -> Floats:
        """Of each used user: sum over positions i <= k of the expected label times `cumulated[i] - cumulated[i - 1]`."""
        share = cumulated[np.minimum(above + sizes, k)] - cumulated[np.minimum(above, k)]
        return as_floats(np.bincount(owner, weights=gain * share))[used]

    discounts = _cumulated_discounts(max(*NDCG_AT, *DCG_AT))
    places = np.arange(max(RECALL_AT) + 1, dtype=np.float64)
    ideal: NDArray[np.int64] = positives[used].astype(np.int64)
    values = {f"ndcg_at_{k}": mean(first(k, discounts) / discounts[np.minimum(ideal, k)]) for k in NDCG_AT}
    values |= {f"dcg_at_{k}": mean(first(k, discounts)) for k in DCG_AT}
    values |= {f"recall_at_{k}": mean(first(k, places) / ideal) for k in RECALL_AT}
    return UserRanking(values, int(used.sum()), int((~used).sum()))


def _cumulated_discounts(most: int) -> Floats:
    """sum_{i <= j} 1 / log2(i + 1) for j = 0 to `most`."""
    return as_floats(np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, most + 2)))))
