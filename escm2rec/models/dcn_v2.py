"""Deep & cross network v2, stacked: a cross network, and layers on top of it (Wang et al., WWW 2021)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet, LowRankMixtureCrossNet

from escm2rec.models.backbone import Backbone, Main, OpenGate
from escm2rec.models.tower import relu_layers


class DcnV2(Backbone):
    """Crosses of all inputs with each other, then ReLU layers, all under every tower: inputs [B, num_inputs] -> shared [B, num_outputs].

    From x_0 = inputs, each cross layer adds the inputs times a linear map of what was crossed so far, so that L layers hold products of up
    to L + 1 inputs (* is element by element):

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l                                           without `rank`
        x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l                                       of `rank` r: U_l [N, r], V_l [r, N]
        x_{l+1} = sum_e s_e x_0 * (U_le relu(C_le relu(V_le x_l)) + b_l) + x_l          of several experts: s = softmax(G x_l), one G

    Stacked: the layers, and then the towers, read what was crossed. Without `hidden` the towers alone are the deep part.
    """

    def __init__(self, num_inputs: int, num_cross_layers: int, rank: int | None, num_experts: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_outputs = (num_inputs, *hidden)[-1]
        self.cross = _cross_net(num_inputs, num_cross_layers, rank, num_experts)
        self.layers = relu_layers(num_inputs, hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, num_inputs] -> [B, num_outputs]."""
        shared: Tensor = self.layers(self.cross(inputs))
        return shared

    def gate(self, main: Main | None = None) -> OpenGate:
        """A new gate, which lets everything through."""
        return OpenGate()


def _cross_net(num_inputs: int, num_layers: int, rank: int | None, num_experts: int) -> nn.Module:
    net: nn.Module
    if rank is None:
        net = CrossNet(num_inputs, num_layers)
    elif num_experts == 1:
        net = LowRankCrossNet(num_inputs, num_layers, rank)
    else:
        net = LowRankMixtureCrossNet(num_inputs, num_layers, num_experts, rank)
    return net
