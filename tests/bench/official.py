"""The opponent: modules of the official repository (facebookresearch/dino), taken from a checkout the user gives.

Nothing of it is kept here. `train_one_epoch` of main_dino.py calls CUDA without asking, so the body of its loop is
driven from here, in its order, with the repository's own network, head, loss, clipping, groups and augmentation.
"""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pretrain.data.loader import Batch


class Reference:
    """The modules of a checkout of facebookresearch/dino."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / "main_dino.py").is_file():
            raise SystemExit(f"--reference {folder} holds no main_dino.py: give a checkout of facebookresearch/dino")
        sys.path.insert(0, str(folder))
        # The checkout dates from 2021 and uses calls that have been deprecated since.
        warnings.simplefilter("ignore")
        self.main, self.vits, self.utils, self.knn = (
            self._load(name, folder) for name in ("main_dino", "vision_transformer", "utils", "eval_knn")
        )
        # The loss reduces its centre over ranks, also over one: there is nothing to do, and no group is needed for it.
        self.main.dist = SimpleNamespace(all_reduce=lambda tensor: None, get_world_size=lambda: 1)

    @staticmethod
    def _load(name: str, folder: Path) -> ModuleType:
        module = importlib.import_module(name)
        if Path(str(module.__file__)).resolve().parent != folder.resolve():
            raise SystemExit(f"`{name}` was imported from {module.__file__}, not from {folder}")
        return module

    def augmentation(self, global_size: int, local_size: int, num_local: int) -> Any:
        """DataAugmentationDINO with the crop sizes, which it fixes at 224 and 96, set from here."""
        transform = self.main.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), num_local)
        for compose, size in (
            (transform.global_transfo1, global_size),
            (transform.global_transfo2, global_size),
            (transform.local_transfo, local_size),
        ):
            compose.transforms[0].size = (size, size)
        return transform


class Images(Dataset):
    """Images behind the augmentation, as ImageFolder gives them.

    Args:
        images: PIL images, or paths of files that are opened when asked for.
        transform: PIL image -> views.
    """

    def __init__(self, images: Sequence[Image.Image | Path], transform: Callable[[Image.Image], list[Tensor]]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image = self.images[index]
        return self.transform(image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")), 0


class OfficialTraining:
    """The official training of main_dino.py, on any device.

    Args:
        reference: the official modules.
        setting: sizes and constants, a step.Setting.
        images: what `steps` trains on; none where views are given.
        drop_path: stochastic depth of the student.
        workers: processes that decode and augment.
    """

    def __init__(
        self,
        reference: Reference,
        setting: Any,
        images: Sequence[Image.Image | Path],
        drop_path: float,
        workers: int = 0,
    ):
        self.reference, self.setting, self.images, self.workers = reference, setting, images, workers
        head = partial(
            reference.vits.DINOHead,
            setting.dim,
            setting.prototypes,
            hidden_dim=setting.hidden,
            bottleneck_dim=setting.bottleneck,
            norm_last_layer=not setting.train_magnitude,
        )
        self.student = reference.utils.MultiCropWrapper(self._vit(drop_path), head()).to(setting.device)
        self.teacher = reference.utils.MultiCropWrapper(self._vit(0.0), head()).to(setting.device)
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.loss = reference.main.DINOLoss(setting.prototypes, 2 + setting.num_local, 0.04, 0.04, 0, 100)
        self.loss.to(setting.device)
        self.optimizer = torch.optim.AdamW(reference.utils.get_params_groups(self.student))
        # fp16 with a scaled loss is what its README trains with; the scale starts where no step overflows.
        self.scaler = torch.amp.GradScaler(setting.device, 2.0**10) if setting.precision == "fp16" else None
        self.losses: list[float] = []
        self._own = self.batches()

    def _vit(self, drop_path: float) -> nn.Module:
        s = self.setting
        return self.reference.vits.VisionTransformer(
            img_size=[s.global_size],
            patch_size=s.patch,
            embed_dim=s.dim,
            depth=s.depth,
            num_heads=s.heads,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            drop_path_rate=drop_path,
        )

    def batches(self) -> Iterator[list[Tensor]]:
        """Views of batch after batch, from its own augmentation."""
        s = self.setting
        loader = DataLoader(
            Images(self.images, self.reference.augmentation(s.global_size, s.local_size, s.num_local)),
            s.batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            pin_memory=s.device != "cpu",
        )
        while True:
            for views, _ in loader:
                yield views

    def forward(self, views: list[Tensor]) -> Tensor:
        """Loss of one batch of views; moves the centre."""
        low = torch.float16 if self.scaler else torch.bfloat16
        with torch.autocast(self.setting.device, low, enabled=self.setting.precision in ("bf16", "fp16")):
            targets = self.teacher(views[:2])
            return self.loss(self.student(views), targets, 0)

    def update(self, views: list[Tensor]) -> float:
        """The body of the official loop: schedules, losses, clipping, optimiser, teacher, logging."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.setting.learning_rate
            if i == 0:
                group["weight_decay"] = self.setting.weight_decay
        loss = self.forward([view.to(self.setting.device, non_blocking=True) for view in views])
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the official loss is not finite")
        self.optimizer.zero_grad()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        self.reference.utils.clip_gradients(self.student, 3.0)
        self.reference.utils.cancel_gradients_last_layer(0, self.student, 0)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        with torch.no_grad():
            m = self.setting.momentum
            for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                teacher.data.mul_(m).add_((1 - m) * student.detach().data)
        if self.setting.device != "cpu":
            torch.cuda.synchronize()
        self.losses.append(loss.item())
        return self.losses[-1]

    def step(self, batch: Batch) -> None:
        """One step on views that are given."""
        self.update(batch.views)

    def first_loss(self) -> float:
        return self.losses[0]

    def steps(self, count: int) -> None:
        """Whole steps, augmentation included."""
        for _ in range(count):
            self.update(next(self._own))
