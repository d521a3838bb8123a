"""Between two logs a step never reads a value from the device. Counted on a CPU, where such a read costs nothing.

On a GPU each of them would wait for all work in progress; test_trainer_gpu.py lets CUDA itself look for them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.data.loader import Batch
from pretrain.methods.method import method_names
from pretrain.training.loop import create_loader
from pretrain.training.meter import Meter
from pretrain.training.recipe import resolve
from pretrain.training.runtime import Runtime
from pretrain.training.schedules import Plan
from pretrain.training.trainer import Trainer
from pretrain.training.waits import BatchWaits

READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
"""Operators that give a value to the host, or whose result has a size that only the device knows."""
READING_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
"""What reads a CPU tensor without an operator."""


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class HostSyncs(TorchDispatchMode):
    """Counts reads of tensors. `on_host` and what is computed from it lie on the host on a GPU machine too: free."""

    def __init__(self, *on_host: Tensor) -> None:
        super().__init__()
        self.found: list[str] = []
        self._on_host = {_place(tensor): tensor for tensor in on_host}  # held, so that no other takes its place
        self._methods = _ReadingMethods(self)

    def __enter__(self):
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._methods.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean_index = name in ("index", "index_put_") and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        unknown_size = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS or boolean_index or unknown_size:
            self.note(name, args[0])
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if inputs and all(_place(value) in self._on_host for value in inputs) and isinstance(result, Tensor):
            self._on_host[_place(result)] = result
        return result

    def note(self, name: str, tensor: Tensor) -> None:
        if _place(tensor) not in self._on_host:
            self.found.append(name)


class _ReadingMethods(TorchFunctionMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING_METHODS:
            self.syncs.note(func.__name__, args[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill(x > 0, 1).nonzero(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64)),
        lambda x: torch.equal(x, x),
    ],
)
def test_every_way_to_read_a_tensor_is_counted(read):
    with HostSyncs() as syncs:
        read(torch.ones(4))
    assert len(syncs.found) == 1, syncs.found


def test_computing_is_not_reading_and_a_tensor_of_the_host_may_be_read():
    counts = torch.arange(3)
    with HostSyncs(counts) as syncs:
        torch.where(torch.ones(4) > 0, 1.0, 2.0).cumsum(0)[torch.tensor([1, 2])].mul_(2)
        assert int(counts.flatten()[2]) == 2 and counts.view(1, 3).sum(-1).tolist() == [3]
    assert syncs.found == []


def _trainer(method, *overrides):
    sizes = [
        "runtime.device=cpu",
        "optim.batch_size=8",
        "optim.freeze_last_layer_epochs=0",
        "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}",
        "model.drop_path=0.2",
    ]
    recipe = resolve(method, preset="digits", overrides=[*sizes, *overrides])
    return Trainer(recipe, Runtime.start(recipe.runtime), Plan(70, 20))


def _syncs_of_steps(trainer, batches: list[Batch], start=0):
    on_host = [batch.masks.counts for batch in batches if batch.masks is not None]
    waits = BatchWaits(create_loader(trainer.recipe, trainer.runtime))
    meter = Meter(trainer, trainer.plan, trainer.recipe, waits, lambda *log: None, lambda progress: None)
    with HostSyncs(*on_host) as syncs:
        for step, batch in enumerate(batches, start):
            trainer.step(waits.next(iter([batch])), step)
            meter.tick(step)
    return syncs.found


OPTIONS = [
    ("dino", "optim.clip_scope=module"),
    ("dino", "optim.name=lars"),
    ("dino", "runtime.precision=bf16"),
    ("dino", "runtime.accumulate=2"),
    ("dino_vmf", "target.centring=prob_ema_log"),
    ("dino", "runtime.checkpoint_activations=true"),
    ("ibot_vmf", "runtime.max_logits_bytes=100000"),
    ("dino", "model.drop_path_subset=true"),
    ("dino", "teacher.kind=previous_epoch"),
    ("ibot", "regularizer.gram=1.0"),
]


@pytest.mark.parametrize(("method", "option"), [*((name, "seed=0") for name in method_names()), *OPTIONS])
def test_no_step_between_two_logs_reads_from_the_device(method, option):
    trainer = _trainer(method, option)
    loader = create_loader(trainer.recipe, trainer.runtime).batches(0)
    assert _syncs_of_steps(trainer, [next(loader) for _ in range(3)]) == []


def test_a_log_does_read():
    trainer = _trainer("dino")
    batch = next(create_loader(trainer.recipe, trainer.runtime).batches(0))
    trainer.step(batch, 0)
    with HostSyncs() as syncs:
        trainer.method.health.read()
    assert syncs.found
