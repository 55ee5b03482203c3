"""GGUF: what is read equals a plain loop over the bytes, and no damaged file does worse than one clear message."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import F16, F32, Q4_1, Q8_0, Tensor, Typed, f32, gguf

from epo.errors import UserError
from epo.models.gguf import GGUFFile


def half(raw: bytes) -> float:
    return struct.unpack("<e", raw)[0]


def single(value: float) -> float:
    """Rounded to float32, as the reader computes."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def plain_q8_0(data: bytes) -> list[float]:
    """32 weights in 34 bytes: a half-precision scale, then signed bytes."""
    weights = []
    for start in range(0, len(data), 34):
        scale = half(data[start : start + 2])
        weights += [single(scale * byte) for byte in struct.unpack("<32b", data[start + 2 : start + 34])]
    return weights


def plain_q4_1(data: bytes) -> list[float]:
    """32 weights in 20 bytes: scale, minimum, then 16 bytes: low nibbles are weights 0-15, high ones 16-31."""
    weights = []
    for start in range(0, len(data), 20):
        scale, minimum = half(data[start : start + 2]), half(data[start + 2 : start + 4])
        nibbles = data[start + 4 : start + 20]
        integers = [byte % 16 for byte in nibbles] + [byte // 16 for byte in nibbles]
        weights += [single(single(integer * scale) + minimum) for integer in integers]
    return weights


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def halves(rng: random.Random, number: int) -> bytes:
    return b"".join(struct.pack("<e", rng.uniform(-2, 2)) for _ in range(number))


def blocks(rng: random.Random, number: int, *, num_halves: int, num_bytes: int) -> bytes:
    return b"".join(halves(rng, num_halves) + rng.randbytes(num_bytes) for _ in range(number))


def test_every_type_equals_a_plain_loop(tmp_path: Path) -> None:
    rng = random.Random(0)
    singles = [single(rng.gauss(0, 1)) for _ in range(12)]
    data = {
        "a": Tensor((3, 4), F32, f32(singles)),
        "b": Tensor((2, 3, 5), F16, halves(rng, 30)),
        "c": Tensor((6, 64), Q8_0, blocks(rng, 12, num_halves=1, num_bytes=32)),
        "d": Tensor((96,), Q4_1, blocks(rng, 3, num_halves=2, num_bytes=16)),
        "e": Tensor((5, 32), Q4_1, blocks(rng, 5, num_halves=2, num_bytes=16)),
    }
    expected = {
        "a": singles,
        "b": [half(data["b"].data[i : i + 2]) for i in range(0, 60, 2)],
        "c": plain_q8_0(data["c"].data),
        "d": plain_q4_1(data["d"].data),
        "e": plain_q4_1(data["e"].data),
    }
    file = GGUFFile(write(tmp_path / "m.gguf", gguf({}, data)[0]))
    assert list(file.tensors) == list(data)
    for name, tensor in data.items():
        found = file.tensor(name)
        assert (found.dtype, found.shape) == (np.float32, tensor.shape)
        assert found.ravel().tolist() == expected[name]
        found[...] = 0  # memory of its own: the file is mapped read-only


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_type(tmp_path: Path, version: int) -> None:
    extremes = {0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31), 6: 0.5, 10: 2**64 - 1, 11: -(2**63)}
    scalars = {f"n{kind}": Typed(kind, value) for kind, value in {**extremes, 7: True, 8: "é 漢\n", 12: 0.1}.items()}
    arrays = {f"list{kind}": Typed(kind, [value, value], items=True) for kind, value in extremes.items()}
    arrays["texts"] = Typed(8, ["a", "", "Ġthe"], items=True)
    arrays["switches"] = Typed(7, [True, False], items=True)
    content, _ = gguf(scalars | arrays, {}, version=version)
    found = GGUFFile(write(tmp_path / "m.gguf", content)).metadata
    assert {key: found[key] for key in scalars} == {key: value.value for key, value in scalars.items()}
    assert found["n7"] is True
    for key, value in arrays.items():
        assert list(found[key]) == value.value


def test_alignment_is_obeyed(tmp_path: Path) -> None:
    metadata = {"general.alignment": Typed(4, 128)}
    tensors = {"a": Tensor((2,), F32, f32([1, 2])), "b": Tensor((2,), F32, f32([3, 4]))}
    file = GGUFFile(write(tmp_path / "m.gguf", gguf(metadata, tensors, alignment=128)[0]))
    assert file.tensor("b").tolist() == [3, 4]
    assert all(info.offset % 128 == 0 for info in file.tensors.values())


def small_file() -> tuple[bytes, int]:
    rng = random.Random(1)
    metadata = {
        "general.architecture": Typed(8, "llama"),
        "general.alignment": Typed(4, 32),
        "tokens": Typed(8, ["a", "b", "the"], items=True),
        "kinds": Typed(5, [1, 3, 1], items=True),
        "switch": Typed(7, True),
    }
    tensors = {
        "w": Tensor((2, 32), Q4_1, blocks(rng, 2, num_halves=2, num_bytes=16)),
        "v": Tensor((32,), Q8_0, blocks(rng, 1, num_halves=1, num_bytes=32)),
        "norm": Tensor((4,), F32, f32([1, 2, 3, 4])),
    }
    return gguf(metadata, tensors)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def test_cut_files_are_refused(tmp_path: Path) -> None:
    content, header = small_file()
    assert len(GGUFFile(write(tmp_path / "m.gguf", content)).tensors) == 3
    last = content.rstrip(b"\0")  # padding after the last tensor may be missing
    for length in [*range(header), *range(header, len(last), 7), len(last) - 1]:
        refusal(write(tmp_path / "m.gguf", content[:length]))


@pytest.mark.filterwarnings("ignore:invalid value|overflow:RuntimeWarning")
@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_read_or_refused(tmp_path: Path, seed: int) -> None:
    """50 files a seed, one to three bits of the header flipped: nothing but the one error, nothing huge."""
    content, header = small_file()
    rng = random.Random(seed)
    refused = 0
    for _ in range(50):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path = write(tmp_path / "m.gguf", bytes(damaged))
        try:
            file = GGUFFile(path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
            continue
        # Four bits hold a weight at best.
        assert sum(file.tensor(name).size for name in file.tensors) <= 2 * len(content)
    assert 10 < refused < 50  # most bits matter, those of names and values do not


HUGE = struct.pack("<Q", 2**63)
HEAD = b"GGUF" + struct.pack("<I", 3)
COUNTS = struct.pack("<QQ", 0, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot read"),
        (b"GGUF", "it ends at byte 4"),
        (b"PK\3\4" + b"\0" * 60, "does not begin with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648"),
        (HEAD + HUGE + HUGE, "announces 9223372036854775808 entries"),
        (HEAD + struct.pack("<Q", 0) + HUGE, "announces 9223372036854775808 entries"),
        (HEAD + COUNTS + HUGE + b"x" * 40, "in the middle of its header"),
        (HEAD + COUNTS + b"\1" + b"\0" * 7 + b"k" + struct.pack("<II", 9, 4) + HUGE, "announces 9223372036854775808"),
        (HEAD + COUNTS + b"\1" + b"\0" * 7 + b"k" + struct.pack("<II", 9, 8) + HUGE, "announces 9223372036854775808"),
        (HEAD + COUNTS + b"\1" + b"\0" * 7 + b"k" + struct.pack("<II", 9, 9) + HUGE, "an array holds values of type 9"),
        (HEAD + COUNTS + b"\1" + b"\0" * 7 + b"\xff" + struct.pack("<II", 4, 9), "a text is not UTF-8"),
        (HEAD + COUNTS + b"\1" + b"\0" * 7 + b"k" + struct.pack("<II", 77, 9), "a value is of type 77"),
    ],
)
def test_impossible_headers(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "m.gguf", content))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (Tensor((1 << 40,), F32, f32([0])), "lies outside the file"),
        (Tensor((1 << 40, 1 << 40), F32, f32([0])), "lies outside the file"),
        (Tensor((0, 32), F32, f32([0])), "which F32 cannot have"),
        (Tensor((2, 33), Q4_1, bytes(60)), "which Q4_1 cannot have"),
        (Tensor((1, 1, 1, 1, 1), F32, f32([0])), "has 5 dimensions"),
        (Tensor((256,), 12, bytes(144)), "is of type Q4_K, which is not read: use a file whose tensors are F32, F16"),
        (Tensor((32,), 2, bytes(18)), "is of type Q4_0, which is not read"),
        (Tensor((32,), 999, bytes(18)), "is of type number 999, which is not read"),
    ],
)
def test_impossible_tensors(tmp_path: Path, tensor: Tensor, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "m.gguf", gguf({}, {"w": tensor})[0]))


@pytest.mark.parametrize("alignment", [Typed(4, 0), Typed(4, 12), Typed(8, "32"), Typed(6, 32.0), Typed(7, True)])
def test_impossible_alignments(tmp_path: Path, alignment: Typed) -> None:
    content, _ = gguf({"general.alignment": alignment}, {"w": Tensor((1,), F32, f32([0]))})
    assert "general.alignment is" in refusal(write(tmp_path / "m.gguf", content))


def test_the_same_name_twice(tmp_path: Path) -> None:
    content, _ = gguf({"ab": Typed(4, 1), "cd": Typed(4, 2)}, {})
    assert "'ab' is there twice" in refusal(write(tmp_path / "m.gguf", content.replace(b"cd", b"ab")))
    content, _ = gguf({}, {"ab": Tensor((1,), F32, f32([0])), "cd": Tensor((1,), F32, f32([0]))})
    assert "'ab' is there twice" in refusal(write(tmp_path / "m.gguf", content.replace(b"cd", b"ab")))


def test_no_file(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere.gguf")
    refusal(tmp_path)
