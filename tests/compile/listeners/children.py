"""Kinds of child modules that Dynamo inlines through `nn.Module._wrapped_call_impl`, where it can see a slot."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

WIDTH = 8


def plain(child: nn.Module) -> nn.Module:
    return child


def forward_hook(child: nn.Module) -> nn.Module:
    child.register_forward_hook(lambda module, args, output: output * 2)
    return child


def forward_pre_hook(child: nn.Module) -> nn.Module:
    child.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
    return child


def instance_forward(child: nn.Module) -> nn.Module:
    """As diffusers and others replace it: a function in the module's own dict that calls the old one."""
    before = child.forward

    def forward(*args, **kwargs):
        return before(*args, **kwargs) * 3

    child.forward = forward
    return child


def accelerate_hook(child: nn.Module) -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Scale(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return tuple(a + 1 for a in args), kwargs

        def post_forward(self, module, output):
            return output * 2

    return add_hook_to_module(child, Scale())


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x + 1) * 2


def own_call(child: nn.Module) -> nn.Module:
    made = OwnCall(WIDTH, WIDTH)
    made.load_state_dict(child.state_dict())
    return made


def weight_norm(child: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for the parametrisation, and what many a VAE still uses
        return nn.utils.weight_norm(child)


def spectral_norm(child: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(child)


def pruned(child: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    return prune.l1_unstructured(child, "weight", amount=0.3)


def parametrized(child: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(child)


def tensor_parallel(child: nn.Module) -> nn.Module:
    """One rank is enough: the hooks that move inputs and outputs are there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
    return parallelize_module(child, init_device_mesh("cpu", (1,)), ColwiseParallel())


def hook_and_own_call(child: nn.Module) -> nn.Module:
    return forward_hook(own_call(child))


CHILDREN: dict[str, Callable[[nn.Module], nn.Module]] = {
    f.__name__: f
    for f in (
        plain,
        forward_hook,
        forward_pre_hook,
        instance_forward,
        accelerate_hook,
        own_call,
        weight_norm,
        spectral_norm,
        pruned,
        parametrized,
        tensor_parallel,
        hook_and_own_call,
    )
}


# Those that can be done to a whole model as well.
ROOTS = ("forward_hook", "forward_pre_hook", "instance_forward", "accelerate_hook")


class Block(nn.Module):
    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = change(nn.Linear(WIDTH, WIDTH))
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, change: Callable[[nn.Module], nn.Module], blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(change) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Outer(nn.Module):
    """A model in a model."""

    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.inner = change(nn.Linear(WIDTH, WIDTH))
        self.net = Net(change, 1)

    def forward(self, x):
        return self.net(self.inner(x)).sin()


class Mixed(nn.Module):
    """One child of every kind, but for the distributed one."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {name: change for name, change in CHILDREN.items() if name != "tensor_parallel"}
        self.layers = nn.ModuleDict({name: change(nn.Linear(WIDTH, WIDTH)) for name, change in kinds.items()})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x
