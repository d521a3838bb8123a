"""FSDP2: every rank keeps a part of the backbones, their gradients and moments. Experimental: tested on CPUs only.

For backbones that do not fit on a GPU. A block's weights come together for its forward and backward pass and are let
go again; every rank still works on its share of the images. Heads, prototypes and the mask token stay whole on every
rank, so that they can be read at any time; their gradients are averaged after the backward pass.

Checkpoints hold whole tensors, so a run may go on with or without sharding and on any number of ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map

from pretrain.errors import UsageError
from pretrain.training.runtime import all_reduce_sum, world_size

if TYPE_CHECKING:
    from pretrain.training.recipe import Recipe


def refuse_unshardable(recipe: Recipe) -> None:
    """Say what does not go together with runtime.sharding=fsdp.

    Raises:
        UsageError: the recipe asks for such a thing.
    """
    refused = {
        f"optim.name={recipe.optim.name}, whose rates depend on whole tensors: use adamw": recipe.optim.name != "adamw",
        "regularizer.gram, which copies the teacher: set it to 0": recipe.regularizer.gram > 0,
        "runtime.gradient_compression: set it to none": recipe.runtime.gradient_compression != "none",
    }
    for what in (what for what, asked in refused.items() if asked):
        raise UsageError(f"runtime.sharding=fsdp does not go with {what}, or use runtime.sharding=none")


def shard(network: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Spread the backbone of a network over the ranks, in place; gives the parameters that stay whole on every rank.

    Args:
        network: called as a module, with `backbone.*` below it; the same weights on every rank.
    """
    network.register_forward_hook(_without_views)
    mesh = init_device_mesh(device.type, (world_size(),))
    whole = {parameter for name, parameter in network.named_parameters() if not name.startswith("backbone.")}
    # Let go after the forward pass too, or a teacher, which has no backward pass, would stay whole.
    for block in getattr(network.get_submodule("backbone"), "blocks", ()):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return [parameter for parameter in network.parameters() if parameter in whole]


def _without_views(network: nn.Module, inputs: Any, outputs: Any) -> Any:
    """FSDP hooks into the backward pass of what a network returns, which a change in place of a view would undo."""
    copies = {id(t): t.clone() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t._is_view()}
    return tree_map(lambda value: copies.get(id(value), value), outputs)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradients of parameters by their mean over ranks, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    total = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    parts = [part.view_as(g) for part, g in zip(total.split(sizes), gradients, strict=True)]
    torch._foreach_copy_(gradients, parts)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor; all of it unless it is sharded. Writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms(tensors: list[Tensor]) -> Tensor:
    """The norms [N] of N whole tensors, of which this rank may have parts."""
    own = torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors]))
    is_sharded = [isinstance(tensor, DTensor) for tensor in tensors]
    if not any(is_sharded):
        return own
    chosen = torch.tensor(is_sharded, device=own.device)
    return torch.where(chosen, all_reduce_sum(own.square()).sqrt(), own)


def whole(state: Any) -> Any:
    """A state with its sharded tensors put together. Every rank must ask for it."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def parts_like(state: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """The whole tensors of a state, cut as those of the same name in another are; no rank sends anything."""
    return {name: _cut(value, like.get(name)) for name, value in state.items()}


def split_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups, each in two where some parameters are sharded and some whole: a fused step takes one kind."""
    split = []
    for group in groups:
        for sharded in (True, False):
            if params := [p for p in group["params"] if isinstance(p, DTensor) is sharded]:
                split.append({**group, "params": params})
    return split


def optimizer_state(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of an optimiser of `split_groups(groups)`, whole, as an optimiser of `groups` gives it.

    Every rank must ask for it.
    """
    values = {p: group for group in optimizer.param_groups for p in group["params"]}
    state, packed, count = {}, [], 0
    for group in groups:
        params = group["params"]
        numbers = list(range(count, count + len(params)))
        packed.append({**values[params[0]], "params": numbers})
        state |= {n: whole(optimizer.state[p]) for n, p in zip(numbers, params, strict=True) if p in optimizer.state}
        count += len(params)
    return {"state": state, "param_groups": packed}


def load_optimizer(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
    """Put what `optimizer_state` gave into an optimiser of `split_groups(groups)`."""
    number = {p: n for n, p in enumerate(p for group in groups for p in group["params"])}
    values = {n: group for group in saved["param_groups"] for n in group["params"]}
    state, packed, count = {}, [], 0
    for group in optimizer.param_groups:
        params = group["params"]
        numbers = list(range(count, count + len(params)))
        packed.append({**values[number[params[0]]], "params": numbers})
        for n, p in zip(numbers, params, strict=True):
            if number[p] in saved["state"]:
                state[n] = {name: _cut(value, p) for name, value in saved["state"][number[p]].items()}
        count += len(params)
    optimizer.load_state_dict({"state": state, "param_groups": packed})


def _cut(value: Any, like: Any) -> Any:
    """A whole tensor, cut like another of its shape; anything else (a count of steps) as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
