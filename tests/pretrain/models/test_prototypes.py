"""The three kinds of prototypes, their layouts in files, and their precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import parametrizations

from pretrain.errors import UsageError
from pretrain.models.prototypes import KINDS, PrototypeKind, Prototypes, kappa


def random_prototypes(kind: PrototypeKind, train_magnitude: bool = False) -> Prototypes:
    torch.manual_seed(0)
    prototypes = Prototypes(8, 5, kind, train_magnitude)
    with torch.no_grad():
        for parameter in prototypes.parameters():
            parameter.mul_(torch.linspace(0.5, 2, 5)[:, None])
    return prototypes


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_start_from_the_same_unit_vectors(kind: PrototypeKind) -> None:
    torch.manual_seed(3)
    prototypes = Prototypes(8, 5, kind)
    torch.manual_seed(3)
    torch.testing.assert_close(prototypes.vectors(), Prototypes(8, 5, "cosine").vectors())
    torch.testing.assert_close(prototypes.norms(), torch.ones(5))


def test_norms_are_one_fixed_trained_or_free() -> None:
    assert torch.allclose(random_prototypes("cosine").norms(), torch.ones(5))
    assert torch.allclose(random_prototypes("weight_norm").norms(), torch.linspace(0.5, 2, 5))
    assert torch.allclose(random_prototypes("free").norms(), torch.linspace(0.5, 2, 5))
    trainable = {name for name, p in Prototypes(8, 5, "weight_norm").named_parameters() if p.requires_grad}
    assert trainable == {"weight_v"}
    assert Prototypes(8, 5, "weight_norm", train_magnitude=True).weight_g.requires_grad


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("layout", ["weight_norm", "parametrized", "plain"])
def test_vectors_survive_every_layout(layout: str, target: PrototypeKind) -> None:
    if layout == "weight_norm":
        source = random_prototypes("weight_norm")
        state, vectors = source.state_dict(), source.vectors()
    elif layout == "plain":
        source = random_prototypes("free")
        state, vectors = source.state_dict(), source.vectors()
    else:
        linear = parametrizations.weight_norm(torch.nn.Linear(8, 5, bias=False))
        state, vectors = linear.state_dict(), linear.weight
    holder = torch.nn.ModuleDict({"last_layer": Prototypes(8, 5, target)})
    before = dict(state)
    holder.load_state_dict({f"last_layer.{key}": value for key, value in state.items()})
    loaded = holder["last_layer"].vectors()
    if target == "cosine":
        vectors = torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(loaded, vectors)
    assert state.keys() == before.keys()


def test_layout_is_converted_in_a_deep_copy_too() -> None:
    source = random_prototypes("free")
    target = copy.deepcopy(Prototypes(8, 5, "weight_norm"))
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target.vectors(), source.vectors())


def test_kappa_is_norm_over_temperature() -> None:
    values = kappa(random_prototypes("free").bfloat16(), 0.1)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    torch.testing.assert_close(values, torch.linspace(5, 20, 5), rtol=1e-2, atol=0)


def test_unknown_kind_names_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        Prototypes(8, 5, "cosin")  # type: ignore[arg-type]
