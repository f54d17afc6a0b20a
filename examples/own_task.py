"""Twenty lines to train your own model: weft run examples/own_task.py:Sine --workers 2"""

import torch

import weft


class Sine(weft.Task):
    def __init__(self, width: int = 64):
        self.width = width

    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(1, self.width), torch.nn.Tanh(), torch.nn.Linear(self.width, 1))

    def data(self):
        x = torch.linspace(-6, 6, 4000)[torch.randperm(4000), None]
        pairs = list(zip(x, x.sin(), strict=True))
        return pairs[:3000], pairs[3000:]

    def loss(self, model, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(model(x), y)

    def optimizer(self, params):
        return torch.optim.Adam(params, lr=1e-2)
