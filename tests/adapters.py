"""A small denoiser, low-rank adapters (LoRA) as peft puts them round its layers, and changes of its
weights of every kind."""

import torch
from torch import nn

from tests.toys import sinusoidal


class Denoiser(nn.Module):
    """Two layers of the timestep, two of the sample (batch, 4)."""

    def __init__(self, width=16):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
        self.enter, self.leave = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x, t):
        return self.leave(torch.tanh(self.enter(x) + self.time(sinusoidal(t, 8))))


class Adapted(nn.Module):
    """A layer under an adapter, with the attributes by which peft tells whether it is fused."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.base_layer = layer
        out, inner = layer.weight.flatten(1).shape
        generator = torch.Generator().manual_seed(out)
        self.down = nn.Parameter(torch.randn(rank, inner, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(out, rank, generator=generator) / 8)
        self.merged = self.disable_adapters = False

    @property
    def weight(self):
        return self.base_layer.weight

    def delta(self):
        return (self.up @ self.down).detach().view_as(self.base_layer.weight)

    def forward(self, x):
        y = self.base_layer(x)
        if self.merged or self.disable_adapters:
            return y
        return y + nn.functional.linear(x, self.delta())

    def merge(self):
        # as peft does: neither the version nor the place of the tensor changes
        self.base_layer.weight.data += self.delta()
        self.merged = True


def adapt(model, *names):
    """Wrap layers of `model` in place; the adapters."""
    made = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        adapter = Adapted(model.get_submodule(name))
        setattr(model.get_submodule(owner), leaf, adapter)
        made.append(adapter)
    return made


def low_rank(shape, seed=0):
    """A delta of rank 2 for a weight."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.Size(shape[1:]).numel()
    up, down = (torch.randn(n, 2, generator=generator) / 8 for n in (shape[0], flat))
    return (up @ down.T).view(shape)


def by_data(model, name):
    model.get_parameter(name).data += low_rank(model.get_parameter(name).shape)


def by_copy(model, name):
    with torch.no_grad():
        old = model.get_parameter(name)
        old.copy_(old + low_rank(old.shape))


def _changed(model, name):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name] += low_rank(state[name].shape)
    return state


def by_loading(model, name):
    model.load_state_dict(_changed(model, name))


def by_assigning(model, name):
    model.load_state_dict(_changed(model, name), assign=True)


def by_a_new_layer(model, name):
    owner = name.rpartition(".")[0]
    parent, _, own = owner.rpartition(".")
    layer = model.get_submodule(owner)
    new = type(layer)(layer.in_features, layer.out_features)
    setattr(model.get_submodule(parent), own, new)


def by_one_element(model, name):
    """Noticed by its version alone: no sample of a few elements finds it."""
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1


CHANGES = [by_data, by_copy, by_loading, by_assigning, by_a_new_layer, by_one_element]
