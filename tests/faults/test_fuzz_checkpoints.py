"""Checkpoint files that somebody broke or made to do harm, read by `pretrain.models.checkpoint.load`.

Time of `nox -s faults`: 45 s on one core for 3,500 inputs.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzzing import changed, fuzz, inputs, json_values, refused, spoilt_bytes, texts
from pretrain.models.backbones import ModelConfig, create_backbone
from pretrain.models.checkpoint import FORMAT, export, load
from pretrain.models.checkpoint_file import INDEX, save, save_safetensors

Count = Callable[..., None]
Files = dict[str, bytes]
MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
)
HEAD = {"num_prototypes": 4, "hidden_dim": 8, "bottleneck_dim": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Whole files of every kind that is read, by suffix."""
    folder = tmp_path_factory.mktemp("whole")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = create_backbone(MODEL).state_dict()
    backbone = {f"backbone.{name}": value for name, value in state.items()}
    recipe = {"method": {"name": "dino"}, "data": {"name": "digits"}, "model": MODEL.model_dump(mode="json")}
    ours = {"format": FORMAT, "recipe": {**recipe, "head": None}, "step": 7, "images_seen": 448, "epoch": 1, "seed": 0}
    save(folder / "ours.pt", {**ours, "student": backbone, "teacher": backbone, "teacher_temperature": 0.04})
    torch.save({"teacher": backbone, "args": {"arch": "vit_tiny"}}, folder / "zip.pth")
    torch.save({"teacher": backbone}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_safetensors(folder / "plain.safetensors", state, {"format": "pt"})
    export(load(folder / "ours.pt"), folder / "export.safetensors")
    np.savez(folder / "arrays.npz", **{name: value.numpy() for name, value in list(state.items())[:3]})
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


KINDS = ("arrays.npz", "export.safetensors", "legacy.pth", "ours.pt", "plain.safetensors", "zip.pth")


@pytest.mark.promise("checkpoint file with flipped bits, lost or doubled parts", "loaded, or exit code 3")
@pytest.mark.parametrize("kind", KINDS)
@inputs(200)
def test_spoilt_files(tmp_path: Path, count: Count, files: Files, kind: str, examples: int) -> None:
    path = tmp_path / kind

    def check(content: bytes) -> None:
        path.write_bytes(content)
        refused(lambda: load(path), path)

    # Most of a file is weights; what is read as a program lies at its ends.
    content = files[kind]
    ends = st.one_of(
        spoilt_bytes(content),
        spoilt_bytes(content[:700]).map(lambda start: start + content[700:]),
        spoilt_bytes(content[-700:]).map(lambda end: content[:-700] + end),
    )
    tried = fuzz(ends, check, examples)
    count("checkpoints, spoilt", inputs_tried=tried, inputs_handled=tried)


def rezipped(content: bytes, edit: Callable[[str, bytes], list[tuple[str, bytes]]], compression: int = 0) -> bytes:
    """The same archive with its members changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            for changed_name, inner in edit(name, old.read(name)):
                new.writestr(changed_name.partition("\0")[0] or "x", inner)
    return buffer.getvalue()


MEMBER_NAMES = (
    "data.pkl",
    "a/data.pkl",
    "../data.pkl",
    "/etc/x",
    "archive/data/0",
    "archive/data/../data.pkl",
    "",
    "a\0b",
)


@pytest.mark.promise("zip tricks: doubled, renamed, missing, compressed members, wrong sizes", "loaded, or exit code 3")
@inputs(500)
def test_zip_tricks(tmp_path: Path, count: Count, files: Files, examples: int) -> None:
    path = tmp_path / "a.pt"
    content = files["ours.pt"]
    members = zipfile.ZipFile(io.BytesIO(content)).namelist()

    def build(victim: str, trick: str, name: str, inner: bytes, compression: int) -> bytes:
        def edit(member: str, old: bytes) -> list[tuple[str, bytes]]:
            if member != victim:
                return [(member, old)]
            return {
                "drop": [],
                "double": [(member, old), (member, inner)],
                "rename": [(name, old)],
                "replace": [(member, inner)],
                "longer": [(member, old + inner * 1000)],
                "shorter": [(member, old[: len(old) // 2])],
                "add": [(member, old), (name, old)],
            }[trick]

        return rezipped(content, edit, compression)

    def lie(built: bytes, field: int, number: int) -> bytes:
        """One of the sizes in the list of members says something else."""
        place = built.rfind(b"PK\1\2")
        return built[: place + field] + struct.pack("<I", number) + built[place + field + 4 :]

    tricks = ("drop", "double", "rename", "replace", "longer", "shorter", "add")
    built = st.builds(
        build,
        st.sampled_from(members),
        st.sampled_from(tricks),
        st.sampled_from(MEMBER_NAMES) | texts.map(lambda text: text.encode("ascii", "replace").decode()),
        st.binary(max_size=40),
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    )
    lies = st.builds(lie, st.just(content), st.sampled_from([16, 20, 24, 28, 42]), st.integers(0, 2**32 - 1))

    def check(made: bytes) -> None:
        path.write_bytes(made)
        refused(lambda: load(path), path)

    tried = fuzz(
        built | lies | st.builds(lie, built, st.sampled_from([20, 24, 42]), st.integers(0, 2**32 - 1)), check, examples
    )
    count("checkpoints, zip tricks", inputs_tried=tried, inputs_handled=tried)


# Instructions of protocol 2, most of which torch's safe reader knows.
ALLOWED = (
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_qtensor", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor", "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_wrapper_subclass", "torch._tensor _rebuild_from_type_v2", "torch FloatStorage", "torch Size",
    "torch Tensor", "torch FloatTensor", "torch float32", "torch device", "torch.nn.parameter Parameter",
    "torch.storage UntypedStorage", "torch.storage TypedStorage", "collections OrderedDict", "collections Counter",
    "argparse Namespace", "_codecs encode", "builtins set", "__builtin__ set", "__builtin__ bytearray",
    "builtins complex", "numpy.core.multiarray scalar", "numpy dtype", "torch.serialization _get_layout",
)  # fmt: skip
FORBIDDEN = (
    "os system", "posix system", "builtins eval", "__builtin__ exec", "builtins getattr", "builtins bytearray",
    "subprocess Popen", "torch load", "torch.hub load", "torch.serialization load", "torch._utils _import_dotted_name",
    "numpy load", "functools partial", "pickle loads", "sys modules", "importlib import_module", "torch.jit load",
)  # fmt: skip


def instructions() -> SearchStrategy[list[bytes]]:
    word = st.sampled_from(
        ["teacher", "backbone.cls_token", "latin1", "hex", "utf-32", "zlib", "cpu", "0", "storage", "f8"]
    )
    number = st.sampled_from([0, 1, 2, 3, 16, 10**6]) | st.integers(-(2**31), 2**31 - 1)
    memo = st.integers(0, 5)
    single = st.sampled_from([bytes([code]) for code in b"(](})etuasbRN\x85\x86\x87\x88\x89\x81Q0012lpd"])
    return st.lists(
        st.one_of(
            single, single,
            st.sampled_from(ALLOWED).map(lambda name: f"c{name}\n".replace(" ", "\n").encode()),
            st.sampled_from(FORBIDDEN).map(lambda name: f"c{name}\n".replace(" ", "\n").encode()),
            word.map(lambda text: b"X" + struct.pack("<I", len(text)) + text.encode()),
            number.map(lambda value: b"J" + struct.pack("<i", value)),
            st.floats().map(lambda value: b"G" + struct.pack(">d", value)),
            memo.map(lambda place: b"q" + bytes([place])), memo.map(lambda place: b"h" + bytes([place])),
            st.sampled_from([b"r" + b"\xff" * 4, b"\x8b\xff\xff\xff\x7f", b"\x8a\xff", b"X" + b"\xff" * 4, b"U\xff"]),
            st.binary(min_size=1, max_size=3),
        ),
        max_size=40,
    )  # fmt: skip


@pytest.mark.promise(
    "pickle program made by generator, with and without names of functions", "exit code 3, and none runs"
)
@pytest.mark.parametrize("container", ["zip", "bare", "legacy"])
@inputs(350)
def test_pickle_programs(
    tmp_path: Path, count: Count, files: Files, container: str, examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"

    def never(*arguments: object) -> None:
        raise AssertionError("code of the file ran")

    for module, name in ((os, "system"), (pickle, "loads"), (torch.hub, "load")):
        monkeypatch.setattr(module, name, never)

    def check(parts: list[bytes]) -> None:
        program = b"\x80\x02" + b"".join(parts) + b"."
        if container == "zip":
            made = rezipped(files["ours.pt"], lambda name, old: [(name, program if name.endswith("data.pkl") else old)])
        elif container == "legacy":  # magic number, protocol and system come first
            whole = io.BytesIO(files["legacy.pth"])
            for _ in range(3):
                pickle.load(whole)
            made = files["legacy.pth"][: whole.tell()] + program + files["legacy.pth"][whole.tell() :]
        else:
            made = program
        path.write_bytes(made)
        refused(lambda: load(path), path)

    tried = fuzz(instructions(), check, examples)
    count("checkpoints, pickle programs", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("payload with entries, types and shapes that no checkpoint has", "loaded, or exit code 2 or 3")
@inputs(400)
def test_strange_payloads(tmp_path: Path, count: Count, files: Files, examples: int) -> None:
    path = tmp_path / "a.pt"
    payload = torch.load(io.BytesIO(files["ours.pt"]), weights_only=True)
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 16, 48, 64]), max_size=5)
    tensors = st.builds(
        lambda size, kind: torch.zeros(size, dtype=kind),
        sizes,
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
    )
    # A stride of nothing: a number that stands for 10^12 of them.
    huge = st.sampled_from([(10**12,), (10**6, 10**6)]).map(lambda size: torch.zeros(1).expand(size))
    outer = changed({key: value for key, value in payload.items() if key not in ("student", "teacher")})

    def build(base: Any, edits: list[tuple[str, Any]], drop: list[str], as_teacher: bool) -> Any:
        network = {name: value for name, value in payload["teacher"].items() if name not in drop} | dict(edits)
        if not isinstance(base, dict):
            return base
        return {"teacher": network} if as_teacher else {**base, "student": network, "teacher": network}

    names = st.sampled_from(list(payload["teacher"])) | texts
    edits = st.lists(st.tuples(names, tensors | huge | json_values), max_size=3)

    def check(made: Any) -> None:
        try:
            torch.save(made, path)
        except (UnicodeEncodeError, RuntimeError):  # half a character
            return
        refused(lambda: load(path), path)

    drops = st.lists(st.sampled_from(list(payload["teacher"])), max_size=2)
    tried = fuzz(st.builds(build, outer, edits, drops, st.booleans()), check, examples)
    count("checkpoints, strange payloads", inputs_tried=tried, inputs_handled=tried)


@pytest.mark.promise("safetensors header or index made by generator, huge declared tensors", "loaded, or exit code 3")
@inputs(400)
def test_safetensors_headers(tmp_path: Path, count: Count, files: Files, examples: int) -> None:
    content = files["export.safetensors"]
    length = struct.unpack("<Q", content[:8])[0]
    header, weights = json.loads(content[8 : 8 + length]), content[8 + length :]
    few = {key: header[key] for key in ["__metadata__", *[key for key in header if key != "__metadata__"][:2]]}
    facts = json.loads(header["__metadata__"]["dinobench"])
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys([key for key in header if key != "__metadata__"], "part.safetensors"),
    }
    few_places = {**index, "weight_map": dict(list(index["weight_map"].items())[:2])}

    def as_file(made: Any, lie: int | None) -> tuple[str, bytes]:
        text = json.dumps(made).encode("utf-8", "replace")
        return "a.safetensors", struct.pack("<Q", len(text) if lie is None else lie) + text + weights

    def with_header(made: Any) -> Any:
        return {**header, **made} if isinstance(made, dict) else made

    huge = st.sampled_from([[2**62], [2**31, 2**31], [10**12], [-1], [0, 2**63 - 1]])
    declared = huge.map(
        lambda shape: {**header, "x": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(weights)]}}
    )
    told = changed(facts).map(lambda made: {**header, "__metadata__": {"format": "pt", "dinobench": json.dumps(made)}})
    lies = st.none() | st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
    headers = changed(few).map(with_header) | declared | told
    indices = (changed(index) | changed(few_places)).map(
        lambda made: ("a" + INDEX, json.dumps(made).encode("utf-8", "replace"))
    )

    def check(made: tuple[str, bytes]) -> None:
        (tmp_path / "part.safetensors").write_bytes(content)
        path = tmp_path / made[0]
        path.write_bytes(made[1])
        refused(lambda: load(path), path)

    tried = fuzz(st.builds(as_file, headers, lies) | indices | indices, check, examples)
    count("checkpoints, safetensors", inputs_tried=tried, inputs_handled=tried)
