"""data/decode.py: every kind of source, every kind of damage, and messages that say what to do."""

from __future__ import annotations

import io
import math
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image, ImageCms
from tolerances import EXACT

from efficientad_fast.data import decode
from efficientad_fast.data.decode import FORMATS, decode_image
from efficientad_fast.errors import EfficientADError, ImageError, InputError


def colours(height: int = 23, width: int = 31, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def chw(image: NDArray[Any]) -> torch.Tensor:
    """The expected result of an ``(H, W)`` or ``(H, W, 3)`` array."""
    planes = np.repeat(image[None], 3, axis=0) if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(planes.copy())


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.is_contiguous()
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, EXACT)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# Files


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "ppm", "webp", "jp2"])
def test_lossless_files(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    path = saved(tmp_path / f"image.{suffix}", Image.fromarray(colours()), **options)
    assert_same(decode_image(path), chw(colours()))
    assert_same(decode_image(str(path)), chw(colours()))


def test_jpeg_files_are_what_pillow_decodes(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.jpg", Image.fromarray(colours()))
    with Image.open(path) as image:
        assert_same(decode_image(path), chw(np.array(image)))


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for name in ("image.jpg", "image", "image.txt"):
        assert_same(decode_image(saved(tmp_path / name, Image.fromarray(colours()), format="PNG")), chw(colours()))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_keep_their_precision(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 1, 255], [256, 4095, 65535]], dtype=np.uint16)
    path = saved(tmp_path / f"image.{suffix}", Image.fromarray(grey))
    assert_same(decode_image(path), chw(grey.astype(np.float32) / np.float32(65535)))
    with pytest.raises(ImageError, match=r"image\.\w+: values from 0 to 65535 where white \(max_value\) is 4095"):
        decode_image(path, max_value=4095)
    path = saved(tmp_path / f"dark.{suffix}", Image.fromarray(np.minimum(grey, 4095)))
    assert decode_image(path, max_value=4095).max() == 1


def test_32_bit_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.tif", Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))
    assert decode_image(path)[0].tolist() == [[0, 1]]
    path = saved(tmp_path / "wide.tif", Image.fromarray(np.array([[-1, 65536]], dtype=np.int32)))
    with pytest.raises(ImageError, match="values from -1 to 65536"):
        decode_image(path)
    path = saved(tmp_path / "floats.tif", Image.fromarray(np.array([[0, 0.25]], dtype=np.float32)))
    assert decode_image(path)[2].tolist() == [[0, 0.25]]
    path = saved(tmp_path / "nan.tif", Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)))
    with pytest.raises(ImageError, match=r"nan\.tif: holds NaN or infinity"):
        decode_image(path)


def test_pgm_headers_say_what_white_is(tmp_path: Path) -> None:
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5\n2 1\n1023\n" + struct.pack(">2H", 0, 1023))
    for max_value in (None, 1023):
        assert decode_image(path, max_value=max_value)[0].tolist() == [[0, 1]]


def test_16_bit_colour_files(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    pixel = struct.pack(">3H", 0x1234, 0xFFFF, 0x00FF)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0))
        + png_chunk(b"IDAT", zlib.compress(b"\0" + pixel))
        + png_chunk(b"IEND", b"")
    )
    assert decode_image(path).flatten().tolist() == [0x12, 0xFF, 0x00]
    with pytest.raises(ImageError, match=r"image\.png: a 16-bit colour file.*max_value=4095 cannot.*uint16 array"):
        decode_image(path, max_value=4095)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 16))])
@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_and_without_transparency(tmp_path: Path, suffix: str, transparency: Any) -> None:
    if suffix == "gif" and isinstance(transparency, bytes):
        transparency = 0
    palette = Image.fromarray(colours()).quantize(16)
    expected = chw(np.array(palette.convert("RGB")))
    options = {} if transparency is None else {"transparency": transparency}
    path = saved(tmp_path / f"image.{suffix}", palette, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(decode_image(path), expected)


def test_alpha_is_dropped_and_hides_nothing(tmp_path: Path) -> None:
    alpha = np.zeros((23, 31, 1), dtype=np.uint8)
    path = saved(tmp_path / "image.png", Image.fromarray(np.concatenate([colours(), alpha], axis=2)))
    assert_same(decode_image(path), chw(colours()))
    grey = np.stack([colours()[..., 0], alpha[..., 0]], axis=2)
    path = saved(tmp_path / "grey.png", Image.frombytes("LA", (31, 23), grey.tobytes()))
    assert_same(decode_image(path), chw(colours()[..., 0]))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "I;16B", "I", "F"]
)
def test_pil_images_of_every_mode(mode: str) -> None:
    value = {"1": 1, "I;16": 65535, "I;16B": 65535, "I": 65535, "F": 1.0}.get(mode, 255)
    image = Image.new(mode, (5, 4))
    image.putpixel((1, 2), value if len(image.getbands()) == 1 else (value,) * len(image.getbands()))
    before = image.copy()
    result = decode_image(image)
    assert result.shape == (3, 4, 5)
    assert result.dtype == (torch.float32 if mode[0] in "IF" else torch.uint8)
    if mode not in ("P", "PA", "CMYK", "YCbCr", "HSV"):
        expected = torch.zeros_like(result)
        expected[:, 2, 1] = 1 if result.dtype == torch.float32 else 255
        assert_same(result, expected)
    elif mode not in ("P", "PA"):
        assert_same(result, chw(np.array(image.convert("RGB"))))
    assert image == before


def test_cmyk_by_hand(tmp_path: Path) -> None:
    cmyk = np.zeros((8, 8, 4), dtype=np.uint8)
    cmyk[..., 1:3] = 255
    path = saved(tmp_path / "image.tif", Image.frombytes("CMYK", (8, 8), cmyk.tobytes()))
    assert decode_image(path)[:, 3, 3].tolist() == [255, 0, 0]


def test_premultiplied_alpha_is_undone() -> None:
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 128)).convert("RGBa")
    red, green, blue = decode_image(image).flatten().tolist()
    assert abs(red - 200) <= 1 and abs(green - 100) <= 1 and abs(blue - 50) <= 1


def test_unconvertible_modes_are_refused() -> None:
    with pytest.raises(ImageError, match="PIL image: has Pillow's mode LAB"):
        decode_image(Image.new("LAB", (2, 2)))


def test_images_of_one_pixel(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "gif", "jpg", "ppm", "tif", "webp"):
        path = saved(tmp_path / f"image.{suffix}", Image.new("RGB", (1, 1), (255, 255, 255)))
        assert decode_image(path).flatten().tolist() == [255, 255, 255]


def test_exif_orientation_is_ignored_unless_asked_for(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "image.png", Image.fromarray(colours()), exif=exif)
    assert_same(decode_image(path), chw(colours()))
    turned = chw(np.rot90(colours(), -1))
    assert_same(decode_image(path, apply_exif=True), turned)
    with Image.open(path) as image:
        assert_same(decode_image(image, apply_exif=True), turned)
        assert image.size == (31, 23)
    plain = saved(tmp_path / "plain.png", Image.fromarray(colours()))
    assert_same(decode_image(plain, apply_exif=True), chw(colours()))


def test_tiff_files_are_turned_as_pillow_turns_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "image.tif", Image.fromarray(colours()), exif=exif)
    with Image.open(path) as image:
        turned = chw(np.asarray(image))
    for apply_exif in (False, True):
        assert_same(decode_image(path, apply_exif=apply_exif), turned)


def test_the_first_of_several_pages_is_taken(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "pages.tif",
        Image.fromarray(colours()),
        save_all=True,
        append_images=[Image.fromarray(colours(5, 6, seed=1))],
    )
    assert_same(decode_image(path), chw(colours()))


# Files that cannot be read


def encoded(format_name: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(colours(64, 64)).save(buffer, format_name)
    return buffer.getvalue()


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, format_name: str, share: float) -> None:
    path = tmp_path / "image.png"
    data = encoded(format_name)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"image\.png: .*(truncated|too damaged)"):
        decode_image(path)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    format_name=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, format_name: str, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(encoded(format_name))
    for position, value in changes:
        # Squared: most changes go to the header.
        data[int(position**2 * (len(data) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = decode_image(path, apply_exif=True)
        except ImageError as error:
            assert "damaged: " in str(error)
        else:
            assert image.shape[0] == 3 and image.numel() > 0


def test_files_that_are_not_images(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"notes\.png: the file is empty"):
        decode_image(path)
    path.write_text("no image at all\n" * 100)
    with pytest.raises(ImageError, match=r"notes\.png: not an image.* PNG"):
        decode_image(path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match=r"notes\.png: not an image"):
        decode_image(path)


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        decode_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="is a folder"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="not a usable path"):
        decode_image("a\0b.png")
    with pytest.raises(ImageError, match="not a usable path"):
        decode_image("a" * 5000)
    with pytest.raises(ImageError, match=r"^\.: is a folder"):
        decode_image("")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipes_do_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    raised: list[BaseException] = []

    def decode() -> None:
        try:
            decode_image(path)
        except ImageError as error:
            raised.append(error)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "pipe.png: is a pipe, socket or device" in str(raised[0])


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ImageError, match=r"image\.png: permission denied; allow"):
            decode_image(path)
    if os.geteuid() != 0:
        path.chmod(0)
        with pytest.raises(ImageError, match=r"image\.png: permission denied; allow"):
            decode_image(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_permission_denied_to_another_user(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    path.chmod(0)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            decode_image(path)
        except ImageError as error:
            os._exit(0 if "permission denied; allow" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("content", [b"ab", b"x", b"\xff\xd8", b"BM", b"P5"])
def test_files_of_a_few_bytes_are_no_images(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"not an image|truncated or damaged") as caught:
        decode_image(path)
    assert "buffer" not in str(caught.value)


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "bomb.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(decode, "MAX_PIXELS", 9999)
    with pytest.raises(ImageError, match=r"bomb\.png: claims 100 x 100 pixels, more than the 9,999.*MAX_PIXELS"):
        decode_image(path)
    monkeypatch.setattr(decode, "MAX_PIXELS", 10000)
    # Pillow's own limit is one for the whole process, and not asked.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(decode_image(path), torch.zeros(3, 100, 100, dtype=torch.uint8))


def test_a_small_file_that_claims_a_huge_size_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    header = struct.pack(">2I5B", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    rows = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + rows + png_chunk(b"IEND", b""))
    with pytest.raises(ImageError, match=r"bomb\.png: claims 2147483647 x 2147483647 pixels"):
        decode_image(path)
    # Compressed text and colour profiles can be bombs, too.
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**28), 9))
    header = struct.pack(">2I5B", 1, 1, 8, 2, 0, 0, 0)
    rows = png_chunk(b"IDAT", zlib.compress(bytes(4)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + text + rows + png_chunk(b"IEND", b""))
    try:
        assert decode_image(path).shape == (3, 1, 1)
    except ImageError as error:
        assert "bomb.png: truncated or damaged" in str(error)


def scans(count: int, side: int = 8) -> bytes:
    """A progressive JPEG file whose last scan is there so many times more, and a camera's data behind its end."""
    buffer = io.BytesIO()
    image = Image.fromarray(colours(side, side)).convert("L")
    image.save(buffer, "JPEG", progressive=True, comment=b"\xff\xda\0\x02" * 200)
    content = buffer.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (count + 1) + content[-2:] + b"\0\x02" + b"\xff\xda\0\x02" * 200


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_jpeg_files_of_many_scans_are_refused(tmp_path: Path, suffix: str) -> None:
    """Each of a few bytes takes as long as the whole image."""
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(scans(decode.MAX_SCANS))
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode_image(path)
    path.write_bytes(scans(decode.MAX_SCANS // 2))
    assert decode_image(path).shape == (3, 8, 8)


def test_scans_are_counted_wherever_they_lie_in_the_file(tmp_path: Path) -> None:
    """Some lie across the ends of what is read at once."""
    for padding in (2**20 - 700, *range(2**20 - 620, 2**20 - 560, 7), 2**20):
        whole = scans(5)
        pieces = [b"\xff\xfe" + (2**16 - 1).to_bytes(2, "big") + bytes(2**16 - 3)] * (padding // (2**16 + 1))
        rest = padding - sum(map(len, pieces))
        if rest >= 4:
            pieces.append(b"\xff\xfe" + (rest - 2).to_bytes(2, "big") + bytes(rest - 4))
        (tmp_path / "image.jpg").write_bytes(whole[:2] + b"".join(pieces) + whole[2:])
        with (tmp_path / "image.jpg").open("rb") as file:
            file.seek(9)
            found = next(most for most in range(99) if not decode._has_more_scans(file, most))
            assert (found, file.tell()) == (6 + 5, 9)


def test_jpeg_2000_files_may_have_fewer_pixels(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.jp2", Image.new("L", (64, 64)))
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\x51") + 6  # what the picture and its tiles measure
    content[at : at + 8] = content[at + 16 : at + 24] = struct.pack(">2I", 20_000, 20_000)
    header = content.index(b"ihdr") + 4
    content[header : header + 8] = struct.pack(">2I", 20_000, 20_000)
    path.write_bytes(content)
    with pytest.raises(ImageError, match="claims 20000 x 20000 pixels, more than the 134,217,728 that are taken"):
        decode_image(path)


HUGE = """
import sys
from pathlib import Path
from tests.small_detector import small_detector

detector = small_detector()
detector.warmup(runs=1)
status = Path("/proc/self/status")

def mebibytes(name):
    return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1]) // 1024

before = mebibytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
print(detector.predict(sys.argv[1]).score, mebibytes("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process's memory")
def test_20000_by_20000_pixels_take_the_memory_of_two_copies(tmp_path: Path) -> None:
    path = saved(tmp_path / "huge.png", Image.new("L", (20_000, 20_000), 77), compress_level=1)
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", HUGE, str(path)], cwd=root, capture_output=True, text=True, timeout=300, check=True
    )
    score, peak = run.stdout.split()
    assert math.isfinite(float(score))
    # 400 MB of grey in Pillow, 1200 MB of colour in the tensor.
    assert int(peak) < 1.15 * 1600e6 / 2**20


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bands_are_put_together_as_the_whole(mode: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(colours(37, 29)).convert(mode)
    whole = decode_image(image, channels_last=channels_last)
    for pixels in (1, 29 * 7, 29 * 36):
        monkeypatch.setattr(decode, "_BAND_PIXELS", pixels)
        assert torch.equal(decode_image(image, channels_last=channels_last), whole)


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_images_of_one_row_or_column(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    path = saved(tmp_path / f"image.{suffix}", Image.new("RGB", size, (255, 255, 255)))
    assert torch.equal(decode_image(path), torch.full((3, size[1], size[0]), 255, dtype=torch.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("profile", [b"", b"garbage" * 100])
def test_colour_profiles_change_nothing(tmp_path: Path, suffix: str, profile: bytes) -> None:
    # Of a space in which red and blue have changed places, no less.
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for red, blue in ((b"rXYZ", b"tmp0"), (b"bXYZ", b"rXYZ"), (b"tmp0", b"bXYZ")):
        swapped = swapped.replace(red, blue)
    plain = saved(tmp_path / f"plain.{suffix}", Image.fromarray(colours()))
    path = saved(tmp_path / f"image.{suffix}", Image.fromarray(colours()), icc_profile=profile or swapped)
    with Image.open(path) as image:
        assert image.info["icc_profile"]
    assert_same(decode_image(path), decode_image(plain))


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_further_frames_and_pages_are_told(tmp_path: Path, suffix: str) -> None:
    options = {"webp": {"lossless": True}}.get(suffix, {})
    first, second = (Image.fromarray(colours(seed=seed)) for seed in range(2))
    several = saved(tmp_path / f"several.{suffix}", first, save_all=True, append_images=[second], **options)
    one = saved(tmp_path / f"one.{suffix}", first, **options)
    told: list[str] = []
    alone = decode_image(one, tell=told.append)
    assert not told
    result = decode_image(several, tell=told.append)
    assert told == [f"{several}: holds several frames or pages, of which the first was taken"]
    assert_same(decode_image(several), result)
    if suffix != "gif":  # whose palettes differ
        assert_same(result, alone)
    # A frame that the caller has chosen is no remainder.
    with Image.open(several) as image:
        image.seek(1)
        decode_image(image, tell=told.append)
    assert len(told) == 1


def test_damage_behind_the_first_frame_does_not_matter(tmp_path: Path) -> None:
    first, second = (Image.fromarray(colours(seed=seed)) for seed in range(2))
    path = saved(tmp_path / "image.gif", first, save_all=True, append_images=[second])
    whole = decode_image(path)
    path.write_bytes(path.read_bytes()[:-500])
    assert_same(decode_image(path), whole)


CUT = """
import shutil, sys
from pathlib import Path
from PIL import ImageFile, TiffImagePlugin
from efficientad_fast.data import decode

path = Path("cut")

def cutting(load, early):
    # What another program does between the header and the pixels, or between the pixels and their copy.
    def loaded(self):
        if early:
            path.open("r+b").truncate(200)
        result = load(self)
        path.open("r+b").truncate(200)
        return result
    return loaded

classes = ImageFile.ImageFile, TiffImagePlugin.TiffImageFile
loads = [one.load for one in classes]
for source in sys.argv[1:]:
    for early in (True, False):
        shutil.copyfile(source, path)
        for one, load in zip(classes, loads):
            one.load = cutting(load, early)
        try:
            print(tuple(decode.decode_image(path).shape))
        except decode.ImageError as error:
            print(error)
"""


def test_a_file_that_is_cut_short_meanwhile_does_not_end_the_process(tmp_path: Path) -> None:
    image = Image.fromarray(colours(500, 500)[..., 0])
    kinds: list[tuple[str, dict[str, str]]] = [("raw.tif", {}), ("lzw.tif", {"compression": "tiff_lzw"}), ("b.bmp", {})]
    paths = [saved(tmp_path / name, image, **options) for name, options in kinds]
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", CUT, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.returncode == 0, run.stderr
    before, after = run.stdout.splitlines()[::2], run.stdout.splitlines()[1::2]
    assert len(before) == len(after) == 3
    assert all("cut: truncated or damaged" in line for line in before)
    assert after == ["(3, 500, 500)"] * 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_file_that_becomes_a_pipe_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    status = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self: status)
    with pytest.raises(ImageError, match=r"image\.png: is a pipe, socket or device"):
        decode_image(path)


def test_a_file_that_vanishes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    status = path.stat()
    path.unlink()
    monkeypatch.setattr(Path, "stat", lambda self: status)
    with pytest.raises(ImageError, match=r"image\.png: no such file"):
        decode_image(path)


def test_links_are_followed_and_loops_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    for name, target in (("link.png", path), ("loop.png", tmp_path / "loop.png"), ("nowhere.png", tmp_path / "gone")):
        (tmp_path / name).symlink_to(target)
    assert_same(decode_image(tmp_path / "link.png"), chw(colours()))
    with pytest.raises(ImageError, match=r"loop\.png': not a usable path .*symbolic links"):
        decode_image(tmp_path / "loop.png")
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        decode_image(tmp_path / "nowhere.png")


@pytest.mark.parametrize("name", ["a b.png", "a\nb.png", " .png", "-o.png", "\\.png", "\udcff\udcfe.png", "[red].png"])
def test_names_of_any_kind(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours())).rename(tmp_path / name)
    assert_same(decode_image(path), chw(colours()))
    assert_same(decode_image(os.fsencode(path).decode(errors="surrogateescape")), chw(colours()))


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    monkeypatch.setattr(decode, "_LARGE_PIXELS", 23 * 31)
    inside: list[int] = []
    most: list[int] = []
    from_pillow = decode._from_pillow

    def watched(*arguments: Any) -> torch.Tensor:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        result = from_pillow(*arguments)
        inside.pop()
        return result

    monkeypatch.setattr(decode, "_from_pillow", watched)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(decode_image, [path] * 8):
            assert_same(result, chw(colours()))
    assert max(most) == 1
    monkeypatch.setattr(decode, "_LARGE_PIXELS", 23 * 31 + 1)
    most.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode_image, [path] * 8))
    assert max(most) > 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open files")
def test_files_are_closed(tmp_path: Path) -> None:
    good = saved(tmp_path / "good.tif", Image.fromarray(colours()))
    bad = tmp_path / "bad.png"
    bad.write_bytes(encoded("PNG")[:500])
    text = tmp_path / "text.png"
    text.write_text("no image")

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    kept: list[BaseException] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for _ in range(5):
            decode_image(good)
            for path in (bad, text):
                with pytest.raises(ImageError) as raised:
                    decode_image(path)
                # The traceback holds the frames, and with them what they have not closed.
                kept.append(raised.value)
    assert count() == before


def test_truncated_pil_images(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encoded("PNG")[:5000])
    with Image.open(path) as image, pytest.raises(ImageError, match=r"PIL image .*image\.png: truncated or damaged"):
        decode_image(image)
    image = Image.open(saved(tmp_path / "closed.png", Image.fromarray(colours())))
    image.close()
    with pytest.raises(ImageError, match=r"closed\.png"):
        decode_image(image)


# Arrays and tensors


@st.composite
def uint8_arrays(draw: st.DrawFn) -> NDArray[np.uint8]:
    channels = draw(st.sampled_from([None, 1, 3, 4]))
    shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    return draw(hnp.arrays(np.uint8, shape if channels is None else (*shape, channels)))


def by_hand(array: NDArray[Any]) -> NDArray[Any]:
    """``(3, H, W)``, pixel by pixel."""
    height, width = array.shape[:2]
    result = np.empty((3, height, width), array.dtype)
    for row in range(height):
        for column in range(width):
            pixel = np.atleast_1d(array[row, column])
            result[:, row, column] = pixel[:3] if len(pixel) >= 3 else pixel[0]
    return result


@given(array=uint8_arrays(), flips=st.tuples(st.sampled_from([1, -1]), st.sampled_from([1, -1])), bgr=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_8_bit_arrays_and_tensors(array: NDArray[np.uint8], flips: tuple[int, int], bgr: bool) -> None:
    expected = by_hand(array[:: flips[0], :: flips[1]])
    order = "bgr" if bgr else "rgb"
    expected = torch.from_numpy(expected[::-1].copy() if bgr and array.ndim == 3 and array.shape[2] > 1 else expected)
    for variant in (array, np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]):
        variant.flags.writeable = False
        assert_same(decode_image(variant[:: flips[0], :: flips[1]], channel_order=order), expected)
    tensor = torch.from_numpy(array.copy())
    tensor = (tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor).flip(
        [-2] * (flips[0] < 0) + [-1] * (flips[1] < 0)
    )
    assert_same(decode_image(tensor, channel_order=order), expected)


@given(
    array=hnp.arrays(np.uint16, st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 4]))),
    white=st.integers(1, 65535),
    byte_order=st.sampled_from(["<", ">"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_16_bit_arrays_and_tensors(array: NDArray[np.uint16], white: int, byte_order: str) -> None:
    array = np.minimum(array, white).astype(np.uint16)
    expected = torch.from_numpy((by_hand(array).astype(np.float64) / white).astype(np.float32))
    assert_same(decode_image(array.astype(f"{byte_order}u2"), max_value=white), expected)
    assert_same(decode_image(torch.from_numpy(array).permute(2, 0, 1), max_value=white), expected)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "f2", "longdouble"])
def test_floating_point_arrays(dtype: str) -> None:
    array = (colours().astype(np.float64) / 255).astype(dtype)
    assert_same(decode_image(array), chw(array.astype(np.float32)))
    assert_same(decode_image(array[..., 0]), chw(array[..., 0].astype(np.float32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_tensors(dtype: torch.dtype) -> None:
    tensor = (chw(colours()).double() / 255).to(dtype).requires_grad_()
    result = decode_image(tensor)
    assert not result.requires_grad
    assert_same(result, tensor.detach().to(torch.float32))


def test_results_share_no_memory_with_the_source() -> None:
    array = np.zeros((4, 4, 3), dtype=np.uint8)
    floats = torch.zeros(3, 4, 4)
    results = [decode_image(array), decode_image(floats), decode_image(Image.fromarray(array))]
    array[...] = 255
    floats.fill_(1)
    assert all(int(result.max()) == 0 for result in results)
    results[0][...] = 7


@pytest.mark.parametrize(
    "source",
    [
        Image.fromarray(colours()),
        Image.fromarray(colours()).convert("L"),
        Image.fromarray(colours()).convert("RGBA"),
        Image.fromarray(colours()).convert("P"),
        colours(1, 1),
        colours()[..., :1],
        colours()[::-2, 3::2],
        torch.from_numpy(colours()).permute(2, 0, 1),
        torch.from_numpy(colours()).permute(2, 0, 1).contiguous(),
        colours()[..., 0].astype(np.uint16),
        colours().astype(np.uint16),
        colours().astype(np.float32) / 255,
        colours()[..., 0].astype(np.float64) / 255,
    ],
    ids=lambda source: f"{type(source).__name__} {getattr(source, 'mode', getattr(source, 'dtype', ''))}",
)
@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_channels_last_is_another_layout_of_the_same(source: Any, channel_order: str) -> None:
    options = {"channel_order": channel_order, "max_value": 300}
    planes = decode_image(source, **options)
    pixels = decode_image(source, channels_last=True, **options)
    assert_same(planes, pixels.contiguous())
    assert pixels.permute(1, 2, 0).is_contiguous()
    assert planes.is_contiguous()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["array", "tensor", "half"])
def test_values_that_are_not_finite(kind: str, value: float) -> None:
    array = np.full((5, 6, 3), 0.5)
    array[3, 4, 1] = value
    source = {"array": array, "tensor": torch.from_numpy(array).permute(2, 0, 1), "half": array.astype(np.float16)}[
        kind
    ]
    with pytest.raises(ImageError, match="holds NaN or infinity"):
        decode_image(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            np.full((4, 4, 3), 255.0),
            r"array of shape \(4, 4, 3\) and dtype float64: values from 255 to 255.*divide by 255",
        ),
        (np.full((4, 4), 2.5, np.float32), "divide by 255 or give them as uint8"),
        (np.full((4, 4), 4095.0), "divide by the value that white has"),
        (np.full((4, 4), -0.5), "normalisation by mean and standard deviation"),
        (np.full((4, 4), 1.01), "values from 1.01 to 1.01, expected .*clip"),
        (torch.full((3, 4, 4), 200.0), r"tensor of shape \(3, 4, 4\) and dtype torch.float32.*divide by 255"),
        (np.zeros((4, 4), np.uint16), "16-bit pixels need max_value"),
        (torch.zeros(4, 4, dtype=torch.uint16), "16-bit pixels need max_value"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"is a batch; give its images one by one, as in list\(array\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"array\[0\]"),
        (torch.zeros(1, 3, 4, 4), r"is a batch.*tensor\[0\]"),
        (np.zeros((0, 4, 3), np.uint8), "has no pixels"),
        (np.zeros((4, 0), np.uint8), "has no pixels"),
        (torch.zeros(3, 0, 4), "has no pixels"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (np.zeros((3, 8, 9), np.uint8), r"array\.transpose\(1, 2, 0\)"),
        (torch.zeros(8, 9, 3), r"tensor\.permute\(2, 0, 1\)"),
        (np.zeros((8, 9, 2), np.uint8), "1, 3 or 4 channels$"),
        (torch.zeros(2, 8, 9), "1, 3 or 4 channels$"),
        (np.zeros(12, np.uint8), r"expected \(H, W\)"),
        (np.array(3, np.uint8), r"expected \(H, W\)"),
        (torch.zeros(()), r"expected \(H, W\)"),
        (np.zeros((4, 4), np.int64), "expected uint8, uint16.*cast"),
        (np.zeros((4, 4), bool), "multiply a mask by 255"),
        (np.zeros((4, 4), complex), "expected uint8"),
        (np.zeros((4, 4), object), "expected uint8"),
        (np.zeros((4, 4), "U3"), "expected uint8"),
        (torch.zeros(4, 4, dtype=torch.int32), "expected uint8"),
        (torch.zeros(4, 4, dtype=torch.complex64), "expected uint8"),
        (torch.zeros(3, 4, 4, device="meta"), "without data"),
        (torch.zeros(3, 4, 4).to_sparse(), "sparse"),
        (torch.zeros(3, 4, 4).to(torch.float8_e4m3fn), "expected uint8, uint16.*cast"),
        (torch.nested.nested_tensor([torch.zeros(3, 4, 4)]), "nested"),
        (None, "an image is a NoneType; expected a path"),
        (b"\x89PNG", r"an image is a bytes.*PIL\.Image\.open\(io\.BytesIO"),
        ([[1, 2], [3, 4]], "an image is a list"),
        (io.BytesIO(), "an image is a BytesIO"),
    ],
)
def test_what_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(source)


@pytest.mark.parametrize("value", [-1, 0, 65536, 4095.0, True, "4095"])
def test_max_value_must_be_one(value: Any) -> None:
    with pytest.raises(InputError, match=r"max_value is .*from 1 to 65535") as raised:
        decode_image(np.zeros((4, 4), np.uint16), max_value=value)
    # An argument, and not one image among others, is at fault.
    assert not isinstance(raised.value, ImageError)


def test_values_above_max_value_are_refused() -> None:
    array = np.array([[0, 4096]], dtype=np.uint16)
    with pytest.raises(ImageError, match=r"values from 0 to 4096 where white .* is 4095; .*bit depth"):
        decode_image(array, max_value=4095)
    assert decode_image(array, max_value=np.int64(4096)).max() == 1


def test_channel_order_must_be_one() -> None:
    with pytest.raises(InputError, match="channel_order is 'BGR'; expected 'rgb', or 'bgr'"):
        decode_image(np.zeros((4, 4), np.uint8), channel_order="BGR")


def test_files_know_their_channel_order(tmp_path: Path) -> None:
    path = saved(tmp_path / "image.png", Image.fromarray(colours()))
    assert_same(decode_image(path, channel_order="bgr"), chw(colours()))


def test_errors_are_those_of_the_package() -> None:
    assert issubclass(ImageError, EfficientADError) and issubclass(ImageError, ValueError)
