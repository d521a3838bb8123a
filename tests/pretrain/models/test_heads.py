"""The projection head against the official DINOHead, and its normaliser switch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.models import vmf
from pretrain.models.heads import HeadConfig, ProjectionHead

Golden = Callable[[str], dict[str, np.ndarray]]


def official_head(reference: dict[str, np.ndarray], variant: str) -> tuple[ProjectionHead, dict[str, Tensor]]:
    """The head of a variant, its structure read from the state dict in the file, and the other arrays."""
    prefix = f"{variant}."
    arrays = {key.removeprefix(prefix): torch.from_numpy(a) for key, a in reference.items() if key.startswith(prefix)}
    state = {key.removeprefix("sd."): value for key, value in arrays.items() if key.startswith("sd.")}
    config = HeadConfig(
        layers=sum(key.startswith("mlp") and value.ndim == 2 for key, value in state.items()),
        hidden=int(reference["hidden_dim"]),
        bottleneck=int(reference["bottleneck_dim"]),
        batch_norm=any("running_mean" in key for key in state),
        num_prototypes=int(reference["out_dim"]),
        train_magnitude=bool(arrays["weight_g_has_grad"]),
    )
    head = ProjectionHead(int(reference["in_dim"]), config)
    head.load_state_dict(state)
    return head.eval(), arrays


def variants(reference: dict[str, np.ndarray]) -> list[str]:
    return sorted({key.split(".")[0] for key in reference if key.endswith(".y_f64")})


def test_golden_dino_head_forward(golden: Golden) -> None:
    reference = golden("dino_head")
    for variant in variants(reference):
        head, arrays = official_head(reference, variant)
        with torch.no_grad():
            torch.testing.assert_close(head(arrays["x"]), arrays["y"], rtol=1e-4, atol=1e-5)
            y = head.double()(arrays["x"].double())
        torch.testing.assert_close(y, arrays["y_f64"], rtol=0, atol=1e-9)


def test_golden_dino_head_gradients(golden: Golden) -> None:
    reference = golden("dino_head")
    for variant in variants(reference):
        head, arrays = official_head(reference, variant)
        x = arrays["x"].clone().requires_grad_()
        (head(x) * arrays["dy"]).sum().backward()
        torch.testing.assert_close(x.grad, arrays["grad_x"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.last_layer.weight_v.grad, arrays["grad_weight_v"], rtol=1e-4, atol=1e-5)
        assert (head.last_layer.weight_g.grad is not None) == bool(arrays["weight_g_has_grad"])
        if "grad_weight_g" in arrays:
            torch.testing.assert_close(head.last_layer.weight_g.grad, arrays["grad_weight_g"], rtol=1e-4, atol=1e-5)


def test_golden_dino_head_init(golden: Golden) -> None:
    """Statistics, not bits: mean and spread of each parameter within sampling error, and its bounds."""
    reference = golden("dino_head")
    torch.manual_seed(0)
    head = ProjectionHead(384, HeadConfig(num_prototypes=1000))
    parameters = dict(head.named_parameters())
    assert list(parameters) == reference["init_stats_names"].tolist()
    for name, (mean, std, low, high), trained in zip(
        reference["init_stats_names"],
        reference["init_stats_mean_std_min_max"],
        reference["init_stats_requires_grad"],
        strict=True,
    ):
        parameter = parameters[name]
        values = parameter.detach()
        error = 6 * std / values.numel() ** 0.5
        assert parameter.requires_grad == trained, name
        assert float(values.mean()) == pytest.approx(mean, abs=2 * error + 1e-12), name
        assert float(values.std()) == pytest.approx(std, abs=2 * error + 1e-12), name
        if max(-low, high) > 10 * std:
            continue  # the official truncated normal gives a weight of -2 or 2 about once in 2^24 draws
        assert float(values.min()) == pytest.approx(low, rel=0.3, abs=1e-12), name
        assert float(values.max()) == pytest.approx(high, rel=0.3, abs=1e-12), name


def test_vectors_formed_once_give_the_same_logits_and_gradients() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(12, HeadConfig(hidden=16, bottleneck=8, num_prototypes=10, train_magnitude=True))
    x = torch.randn(6, 12)
    head(x).square().sum().backward()
    per_call = [p.grad.clone() for p in head.last_layer.parameters() if p.grad is not None]
    head.zero_grad()
    vectors = head.last_layer.vectors()
    torch.cat([head.project(part) @ vectors.T for part in x.chunk(3)]).square().sum().backward()
    once = [p.grad for p in head.last_layer.parameters()]
    torch.testing.assert_close(once, per_call)


def test_bottleneck_output_is_float32_of_unit_length_under_autocast() -> None:
    head = ProjectionHead(12, HeadConfig(hidden=16, bottleneck=8, num_prototypes=10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head.project(torch.randn(4, 12))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize(("normaliser", "form"), [("vmf", "exact"), ("vmf_leading", "leading")])
def test_normaliser_is_added_at_the_temperature_of_the_logits(normaliser: str, form: vmf.Form) -> None:
    torch.manual_seed(0)
    config = HeadConfig(hidden=16, bottleneck=16, num_prototypes=10, prototypes="free", normaliser=normaliser)  # type: ignore[arg-type]
    head = ProjectionHead(12, config)
    with torch.no_grad():
        head.last_layer.weight.mul_(torch.linspace(0.2, 3, 10)[:, None])
    z = head.project(torch.randn(4, 12))
    for tau in (0.04, 0.1):
        expected = vmf.vmf_logits(z, head.last_layer.vectors(), tau, form)
        torch.testing.assert_close(head.logits(z, tau), expected)
        torch.testing.assert_close(head.log_normaliser(tau), vmf.vmf_bias(head.last_layer.weight, tau, form))


def test_head_without_normaliser_has_none() -> None:
    head = ProjectionHead(12, HeadConfig(hidden=16, bottleneck=8, num_prototypes=10))
    assert head.log_normaliser(0.1) is None
    z = head.project(torch.randn(4, 12))
    torch.testing.assert_close(head.logits(z, 0.1), head.last_layer(z) / 0.1)


def test_equal_norms_equal_dino() -> None:
    """With prototypes of one length log C_p is a constant and drops out of the softmax."""
    torch.manual_seed(0)
    plain = ProjectionHead(12, HeadConfig(hidden=16, bottleneck=16, num_prototypes=10, prototypes="cosine"))
    mixture = ProjectionHead(
        12, HeadConfig(hidden=16, bottleneck=16, num_prototypes=10, prototypes="cosine", normaliser="vmf")
    )
    mixture.load_state_dict(plain.state_dict())
    z = plain.project(torch.randn(4, 12))
    expected = plain.logits(z, 0.07).softmax(-1)
    torch.testing.assert_close(mixture.logits(z, 0.07).softmax(-1), expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prototypes": "free", "train_magnitude": True}, "train_magnitude belongs to prototypes=weight_norm"),
        ({"normaliser": "vmf", "bottleneck": 8}, "p >= 16, found p = 8"),
        ({"layer": 3}, "Extra inputs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HeadConfig(**values)


def test_xavier_init_starts_larger() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(64, HeadConfig(hidden=128, bottleneck=64, num_prototypes=10, init="xavier"))
    first = head.mlp.get_submodule("0").weight
    assert isinstance(first, Tensor)
    assert float(first.detach().std()) == pytest.approx((2 / (64 + 128)) ** 0.5, rel=0.05)
    assert not head.mlp.get_submodule("0").bias.any()  # type: ignore[union-attr, operator]


def test_golden_dinov2_head(golden: Golden) -> None:
    """DINOv2's head is DINO's with trained magnitudes; its norm is guarded by 1e-6 in half precision only."""
    reference = {key: torch.from_numpy(array) for key, array in golden("dinov2_head").items()}
    state = {key.removeprefix("sd."): value for key, value in reference.items() if key.startswith("sd.")}
    config = HeadConfig(
        hidden=state["mlp.0.weight"].shape[0],
        bottleneck=state["mlp.4.weight"].shape[0],
        num_prototypes=state["last_layer.weight_v"].shape[0],
        train_magnitude=True,
    )
    head = ProjectionHead(state["mlp.0.weight"].shape[1], config)
    assert [p.requires_grad for _, p in head.named_parameters()] == reference["requires_grad"].tolist()
    head.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(head(reference["x"]), reference["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_head_without_prototypes_has_an_mlp_only(activation: str) -> None:
    sizes = {"hidden": 16, "bottleneck": 8, "num_prototypes": 0, "init": "xavier", "final_batch_norm": True}
    head = ProjectionHead(12, HeadConfig.model_validate({**sizes, "activation": activation}))
    assert head.last_layer is None and not any("last_layer" in name for name in head.state_dict())
    m = head.mlp(torch.randn(32, 12))
    torch.testing.assert_close(m.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(m.var(0, unbiased=False), torch.ones(8), atol=1e-2, rtol=0)
