"""An unusual task that runs unchanged: tied weights, BatchNorm, dropout, a frozen layer, a batch that is a dict.

weft run examples/unusual.py:Denoise --workers 2
"""

import torch
import torch.nn.functional as F
from torch import nn

import weft


class Autoencoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16).requires_grad_(False)  # a fixed random rotation
        self.encode = nn.Linear(16, width)
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.1)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(F.relu(self.norm(self.encode(self.mix(x)))))
        return F.linear(hidden, self.encode.weight.T, self.bias)  # the decoder is the encoder, transposed


class Denoise(weft.Task):
    defaults = weft.Defaults(batch=64, epochs=20)

    def __init__(self, width: int = 32, noise: float = 0.3) -> None:
        self.width, self.noise = width, noise

    def model(self):
        return Autoencoder(self.width)

    def data(self):
        clean = torch.randn(1500, 3) @ torch.randn(3, 16)
        examples = [{"clean": c, "noisy": c + self.noise * torch.randn(16)} for c in clean]
        return examples[:1200], examples[1200:]

    def loss(self, model, batch):
        return F.mse_loss(model(batch["noisy"]), batch["clean"])

    def optimizer(self, params):
        return torch.optim.Adam(params, lr=3e-3)
