"""Compiled blocks on a CPU: the loss and gradients of eager ones, at both crop sizes and for the teacher too."""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from pretrain.data.loader import Batch
from pretrain.data.masks import MaskSampler
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    # torch.compile looks at .grad of tensors that are no leaves; its own filter is overruled where warnings are errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

TINY = [
    "head.batch_norm=false",  # it takes the gradient from the biases before it: what is left there is rounding
    "optim.clip=0",
    "head.hidden=16",
    "head.bottleneck=16",
    "head.num_prototypes=12",
    "optim.batch_size=4",
    "optim.freeze_last_layer_epochs=0",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
    "runtime.device=cpu",
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.drop_path=0",
]


@pytest.fixture(scope="module", autouse=True)
def _compiler(tmp_path_factory):
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("torch.compile needs a C++ compiler, and there is none on the path")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(inductor_config, "compile_threads", 1)  # no pool of processes that outlives the tests
        yield


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def _step(method, *overrides):
    """The loss and the gradients of one step."""
    recipe = resolve(method, preset="digits", overrides=[*TINY, *overrides])
    trainer = Trainer(recipe, Runtime.start(recipe.runtime), Plan(2, 3))
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(4, 3, view.size, view.size, generator=generator) for view in recipe.views.views]
    masks = None
    if recipe.masks.kind != "none":
        masks = MaskSampler(recipe.masks, (4, 4), seed=0)(torch.arange(4), 0, step=0, first=0, batch_size=4)
    trainer.step(Batch(views, torch.arange(4), 0, masks), 0)
    gradients = {name: p.grad for name, p in trainer.method.student.named_parameters() if p.grad is not None}
    return {"loss": trainer.method.health.sum_loss, **gradients}


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dino_vmf", []), ("ibot", []), ("dino_vmf", ["runtime.checkpoint_activations=true"])],
)
def test_compiled_blocks_give_the_loss_and_gradients_of_eager_ones(method, settings):
    eager = _step(method, *settings)
    compiled = _step(method, *settings, "runtime.compile=true")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    if method == "dino_vmf":  # of its two blocks the last has another form, where CLS alone is read
        names = {metrics.co_name for metrics in torch._dynamo.utils.get_compilation_metrics()}
        assert {"forward", "cls_of"} <= names, names
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        # Relative to the tensor: a sum over many tokens rounds as the sum of their sizes does.
        error = (compiled[name] - value).norm() / value.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"
