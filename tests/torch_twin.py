"""The networks of an off-policy script in PyTorch, from the arrays that the script saves."""

import numpy as np
import torch
from torch.nn.functional import linear, relu


class Twin:
    def __init__(self, arrays: dict[str, np.ndarray], tau: float):
        self.tau = tau
        self.params = {
            name: torch.tensor(x, requires_grad=not name.startswith("target_"))
            for name, x in arrays.items()
            if not name.startswith("optimizer.")
        }

    def weights(self, network: str) -> list[torch.Tensor]:
        return [x for name, x in self.params.items() if name.startswith(f"{network}.")]

    def __call__(self, network: str, x: torch.Tensor, which: int | None = None) -> torch.Tensor:
        for layer in (0, 2, 4):
            weight, bias = (self.params[f"{network}.{layer}.{name}"] for name in ("weight", "bias"))
            x = linear(x, weight, bias) if which is None else linear(x, weight[which], bias[which])
            x = relu(x) if layer < 4 else x
        return x

    def q(self, network: str, observations: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """(B,) of either critic"""
        x = torch.cat([observations, actions], -1)
        return [self(network, x, which)[:, 0] for which in range(2)]

    def move_targets(self, *networks: str) -> None:
        with torch.no_grad():
            for name, x in self.params.items():
                if name.startswith("target_") and name.split(".")[0].removeprefix("target_") in networks:
                    x += self.tau * (self.params[name.removeprefix("target_")] - x)


def compare(arrays: dict[str, np.ndarray], twin: Twin) -> None:
    for name, x in twin.params.items():
        np.testing.assert_allclose(arrays[name], x.detach().numpy(), rtol=1e-9, atol=1e-9, err_msg=name)
