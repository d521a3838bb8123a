"""Student and teacher as one network: heads for image and patch tokens as in iBOT, views in groups, masks."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.masks import Masks
from pretrain.errors import UsageError
from pretrain.models.backbones import ModelConfig
from pretrain.models.heads import HeadConfig
from pretrain.models.network import Network
from pretrain.models.patch_head import PatchConfig

MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    drop_path=0.0,
)


@pytest.mark.parametrize("variant", ["shared", "separate"])
def test_golden_ibot_head(golden, variant):
    """One MLP for all tokens; the prototypes of the patches are those of [CLS], or their own (`last_layer2`)."""
    reference = golden("ibot_head")
    arrays = {k.removeprefix(f"{variant}."): v for k, v in reference.items() if k.startswith(f"{variant}.")}
    own = {} if variant == "shared" else {"num_prototypes": int(reference["patch_out_dim"])}
    patch = PatchConfig(weight=1, head="shared" if variant == "shared" else "last_layer", **own)
    head = HeadConfig(
        hidden=int(reference["hidden_dim"]),
        bottleneck=int(reference["bottleneck_dim"]),
        num_prototypes=int(reference["out_dim"]),
        train_magnitude=True,
    )
    network = Network(MODEL, head, patch)
    state = {k.removeprefix("sd."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("sd.")}
    patches = {k.removeprefix("last_layer2."): v for k, v in state.items() if "last_layer2" in k}
    network.head.load_state_dict({k: v for k, v in state.items() if "last_layer2" not in k})
    if variant == "separate":
        network.patch_last_layer.load_state_dict(patches)
    else:
        assert network.patch_last_layer is None and network.patch_prototypes is network.head.last_layer
    x = torch.from_numpy(arrays["x"])
    with torch.no_grad():
        cls = network.head(x[:, 0])
        z = network._project_patches(x[:, 1:].flatten(0, 1))
        logits = network.patch_prototypes(z).unflatten(0, x[:, 1:].shape[:2])
    torch.testing.assert_close(cls, torch.from_numpy(arrays["cls"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cls, torch.from_numpy(arrays["cls_2d_input"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, torch.from_numpy(arrays["patch"]), rtol=1e-4, atol=1e-5)
    assert variant == "shared" or len(arrays["param_names"]) == len(list(network.head.parameters())) + 2


def test_views_of_several_sizes_give_what_each_view_gives_alone():
    torch.manual_seed(0)
    network = Network(MODEL, HeadConfig(hidden=16, bottleneck=16, num_prototypes=10)).eval()
    views = [torch.randn(3, 3, size, size) for size in (16, 16, 8, 8, 16)]
    together = network(views)
    for number, view in enumerate(views):
        alone = network([view])
        torch.testing.assert_close(together.z[number], alone.z[0])
        torch.testing.assert_close(together.features[number], alone.features[0])


def test_the_cls_token_of_a_masked_pass_is_that_of_a_plain_one_when_nothing_is_masked():
    torch.manual_seed(0)
    head = HeadConfig(hidden=16, bottleneck=16, num_prototypes=10)
    network = Network(MODEL, head, PatchConfig(weight=1), mask_token=True).eval()
    views = [torch.randn(3, 3, 16, 16) for _ in range(2)]
    masks = Masks.of(torch.zeros(2, 3, 16, dtype=torch.bool))
    torch.testing.assert_close(network(views, masks, "replace").z, network(views).z)
    torch.testing.assert_close(network(views, masks, "drop").z, network(views).z)
    assert network(views, masks, patches="all").patch_z.shape == (2 * 3 * 16, 16)


def test_sizes_that_do_not_go_with_the_kind_of_patch_head_are_refused():
    with pytest.raises(UsageError, match=r"patch\.bottleneck does not go with patch\.head=last_layer"):
        Network(MODEL, HeadConfig(), PatchConfig(weight=1, head="last_layer", bottleneck=8))
