"""CVR losses per impression, before any mean: each differs in how a clicked row speaks for the unclicked.

Symbols, all [B]: o click; r conversion had the user clicked, 0 where o = 0; z CVR logit; delta = BCE(sigmoid(z), r);
q propensity, held; delta_hat imputed error; m imputed label.
"""

from __future__ import annotations

from torch import Tensor


def naive_losses(delta: Tensor, click: Tensor) -> Tensor:
    """o delta; over N_c, the clicked impressions. Biased for all impressions wherever clicking and converting go together."""
    return click * delta


def ips_losses(delta: Tensor, click: Tensor, q: Tensor) -> Tensor:
    """o delta / q; over N (inverse propensity scoring: Multi-IPW, WWW 2020; ESCM2-IPS, SIGIR 2022). Unbiased under the true q."""
    return click * delta / q


def dr_losses(delta: Tensor, delta_hat: Tensor, click: Tensor, q: Tensor) -> Tensor:
    """delta_hat + o (delta - delta_hat) / q; over N (doubly robust: DR-JL, ICML 2019; ESCM2-DR, SIGIR 2022).

    Unbiased under the true q, or under any q where E[delta - delta_hat | x] = 0.
    """
    return delta_hat + click * (delta - delta_hat) / q


def pseudo_labels(m: Tensor, conversion: Tensor, click: Tensor, q: Tensor, clip: bool) -> Tensor:
    """m + (o / q)(r - m), the label whose BCE is the doubly robust loss with delta_hat = BCE(sigmoid(z), m).

    It lies outside [0, 1] on every clicked row with q < 1, where its BCE has no lower bound; `clip` cuts it to [0, 1],
    which bounds the loss and biases it.
    """
    labels = m + click * (conversion - m) / q
    return labels.clamp(0, 1) if clip else labels
