"""A suite's version and the fingerprint of its numbers, side by side.

A failure here means that a pinned number, a default of a protocol or a transform has changed: raise the suite's version
and write the new pair down. Old results then stay comparable among themselves and are never mixed with new ones.
"""

from __future__ import annotations

from suites.suite import load_suite, suite_names

FINGERPRINTS = {
    "ade20k_segmentation": (1, "474c2eaca13a"),
    "camvid_segmentation": (1, "a6f5e635711d"),
    "cifar10_alignment": (1, "388a8f4c4a3b"),
    "cifar10_clusters": (1, "fd5e972c3c8a"),
    "cifar10_fewshot": (1, "130fec3ff722"),
    "cifar10_finetune": (1, "6ea1329959a3"),
    "cifar10_knn": (1, "bd3387f959df"),
    "cifar10_linear": (1, "81ec35fc24e6"),
    "cifar10_linear_augmented": (1, "72194d7b5960"),
    "cifar10_linear_sweep": (1, "67bdd0237a46"),
    "cifar10_logistic": (1, "085e3d870fdd"),
    "cifar10_prototypes": (1, "36d50d609c54"),
    "cifar10_representation": (1, "3c4cce397511"),
    "coil20_retrieval": (1, "1e2760e56f20"),
    "copydays": (1, "a6c62de3a599"),
    "davis2016": (1, "0d230a4399a9"),
    "davis2017": (1, "0e3e68373d94"),
    "digits_alignment": (1, "ff3da4e16c77"),
    "digits_clusters": (1, "2f5c94c12743"),
    "digits_fewshot": (1, "840eb816d5a9"),
    "digits_finetune": (1, "71df0f0a8e85"),
    "digits_knn": (1, "127d468fb845"),
    "digits_knn_dinov2": (1, "80337c21ccd0"),
    "digits_linear": (1, "d8b0768a621e"),
    "digits_linear_sweep": (1, "77827e7454eb"),
    "digits_logistic": (1, "70d6cd7aeb97"),
    "digits_logistic_fewshot": (1, "82119d99289c"),
    "digits_prototypes": (1, "49070ea8a0b0"),
    "digits_representation": (1, "8985999e9a24"),
    "digits_ridge_fewshot": (1, "b45f5dff2f33"),
    "fashion_mnist_clusters": (1, "ea6aebceabd5"),
    "fashion_mnist_fewshot": (1, "edc11b6adb0a"),
    "fashion_mnist_knn": (1, "e4ebcda8dc34"),
    "fashion_mnist_linear": (1, "61b318dec8f2"),
    "fashion_mnist_linear_sweep": (1, "9419c2ab92ca"),
    "fashion_mnist_logistic": (1, "e9f5f16af20e"),
    "fashion_mnist_prototypes": (1, "212982226515"),
    "fashion_mnist_representation": (1, "72a51c522b3e"),
    "imagenet_alignment": (1, "b206c0f205c7"),
    "imagenet_cached_linear": (1, "bb9471345242"),
    "imagenet_fewshot": (1, "cb070f9fe012"),
    "imagenet_finetune": (1, "ad8a8aab78cf"),
    "imagenet_knn": (1, "14ce5627c1a2"),
    "imagenet_knn_dinov2": (1, "6a03048dd677"),
    "imagenet_linear": (2, "f722a1467631"),
    "imagenet_linear_sweep": (1, "a37faae43363"),
    "imagenet_logistic": (1, "11f4863cefca"),
    "imagenet_representation": (1, "e4aa8702b6c9"),
    "roxford": (1, "20b7e6b24757"),
    "rparis": (1, "0ede6c2590aa"),
    "tiny_imagenet_fewshot": (1, "02d2f759ff2c"),
    "tiny_imagenet_knn": (1, "b8315d5b7893"),
    "tiny_imagenet_logistic": (1, "b781e8259a6d"),
    "transfer_aircraft": (1, "06b7b9cf576c"),
    "transfer_caltech101": (1, "244e4bfac991"),
    "transfer_cars": (1, "bf2b56482e7a"),
    "transfer_cifar10": (1, "11ce71d780b1"),
    "transfer_cifar100": (1, "978c568a9de0"),
    "transfer_dtd": (1, "db081ed2de96"),
    "transfer_flowers102": (1, "818fb0ba9f67"),
    "transfer_food101": (1, "e0253dd29a19"),
    "transfer_pets": (1, "d0ea5b62f0d3"),
    "transfer_sun397": (1, "3831a132cd4e"),
    "transfer_voc2007": (1, "aea6c0257af5"),
    "voc2012_segmentation": (1, "63a60d7d8eb2"),
}


def test_changed_numbers_raise_the_version() -> None:
    found = {name: (suite.version, suite.fingerprint()) for name in suite_names() for suite in [load_suite(name)]}
    assert found == FINGERPRINTS
