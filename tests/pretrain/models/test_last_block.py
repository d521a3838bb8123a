from __future__ import annotations

import pytest
import torch

from pretrain.models.backbones import ModelConfig, create_backbone

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("extra", [{}, {"qk_norm": True}, {"init_values": 0.1}, {"qkv_bias": False}, {"reg_tokens": 2}])
def test_last_block_for_cls_alone_equals_the_whole_block(extra: dict) -> None:
    torch.manual_seed(0)
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs={**SMALL, **extra}, drop_path=0.0, init="timm")
    backbone = create_backbone(model, drop_path=0.5).double().train()
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    gradients, outputs = [], []
    for forward in (backbone, lambda x: backbone.forward_head(backbone.forward_features(x))):
        torch.manual_seed(1)  # the same samples are dropped
        output = forward(images)
        backbone.zero_grad()
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append({name: p.grad.clone() for name, p in backbone.named_parameters()})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-10, msg=name)


def test_pooled_patches_still_come_from_the_whole_block() -> None:
    model = ModelConfig(name="vit_tiny_patch16_224", kwargs={**SMALL, "global_pool": "avg"}, drop_path=0.0)
    backbone = create_backbone(model).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = backbone.forward_head(backbone.forward_features(images))
    torch.testing.assert_close(backbone(images), expected)
