"""The opponent: modules of the official repository (facebookresearch/dino), taken from a checkout the user gives.

Nothing of it is kept here. `train_one_epoch` of main_dino.py calls CUDA without asking, so the body of its loop is
driven from here, in its order, with the repository's own network, head, loss, clipping, groups and augmentation.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Reference:
    """The modules of a checkout of facebookresearch/dino."""

    def __init__(self, folder: Path):
        if not (folder / "main_dino.py").is_file():
            raise SystemExit(f"--reference {folder} holds no main_dino.py: give a checkout of facebookresearch/dino")
        sys.path.insert(0, str(folder))
        # The checkout dates from 2021 and uses calls that have been deprecated since.
        warnings.simplefilter("ignore")
        self.main, self.vits, self.utils, self.knn = (
            self._load(name, folder) for name in ("main_dino", "vision_transformer", "utils", "eval_knn")
        )
        if not dist.is_initialized():  # the loss reduces its centre over ranks, also over one
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

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
    """PIL images behind the augmentation, as ImageFolder gives them."""

    def __init__(self, images: list[Image.Image], transform: Any):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return self.transform(self.images[index]), 0


class OfficialTraining:
    """The official training of main_dino.py without CUDA calls."""

    def __init__(self, reference: Reference, setting: Any, images: list[Image.Image], drop_path: float):
        self.reference, self.setting = reference, setting
        head = partial(
            reference.vits.DINOHead,
            setting.dim,
            setting.prototypes,
            hidden_dim=setting.hidden,
            bottleneck_dim=setting.bottleneck,
        )
        self.student = reference.utils.MultiCropWrapper(self._vit(drop_path), head()).to(setting.device)
        self.teacher = reference.utils.MultiCropWrapper(self._vit(0.0), head()).to(setting.device)
        self.teacher.load_state_dict(self.student.state_dict())
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.loss = reference.main.DINOLoss(setting.prototypes, 2 + setting.num_local, 0.04, 0.04, 0, 100)
        self.loss.to(setting.device)
        self.optimizer = torch.optim.AdamW(reference.utils.get_params_groups(self.student))
        transform = reference.augmentation(setting.global_size, setting.local_size, setting.num_local)
        self.loader = DataLoader(Images(images, transform), setting.batch, shuffle=True, drop_last=True)
        self.batches = self._endless()

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

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            for views, _ in self.loader:
                yield views

    def forward(self, views: list[Tensor]) -> Tensor:
        """Loss of one batch of views; moves the centre."""
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            targets = self.teacher(views[:2])
            return self.loss(self.student(views), targets, 0)

    def update(self, views: list[Tensor]) -> float:
        """The body of the official loop: schedules, losses, clipping, optimiser, teacher, logging."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.setting.learning_rate
            if i == 0:
                group["weight_decay"] = self.setting.weight_decay
        loss = self.forward(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.reference.utils.clip_gradients(self.student, 3.0)
        self.reference.utils.cancel_gradients_last_layer(0, self.student, 0)
        self.optimizer.step()
        with torch.no_grad():
            m = self.setting.momentum
            for student, teacher in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                teacher.data.mul_(m).add_((1 - m) * student.detach().data)
        return loss.item()

    def steps(self, count: int) -> None:
        """Whole steps, augmentation included."""
        for _ in range(count):
            self.update([view.to(self.setting.device) for view in next(self.batches)])
