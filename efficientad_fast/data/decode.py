"""Images of any kind to ``(3, H, W)`` RGB tensors. Source: SPEC "Input"."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from torch import Tensor

from efficientad_fast.errors import ImageError, InputError

FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000")
"""Pillow's names of what is read, the common ones first. Its other readers stay shut: one of them starts a program."""

MAX_PIXELS = 2**29
"""What a file's image may have: 20,000 x 20,000 and some more. A larger one is refused before its pixels are decoded,
since a file of a few bytes can claim any size. It is in place of ``PIL.Image.MAX_IMAGE_PIXELS``, which refuses less
than half of that; set it as that one is set."""

CHANNEL_ORDERS = ("rgb", "bgr")

_PIXELS_OF_FORMAT = {"JPEG2000": 2**27}
"""Where the reader takes much more memory than the image: 19 bytes a pixel, of a file that may have a kilobyte."""

MAX_SCANS = 100
"""Of a JPEG file. Each goes over all pixels, and takes ten bytes; a progressive file has about ten."""

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

_UINT16_MAX = 65535

_BAND_PIXELS = 2**22
"""What is converted at a time, so that a large image is in memory once as Pillow has it and once as a tensor."""

_LARGE_PIXELS = 2**26
"""From here on, images are decoded one at a time, whatever the number of threads."""

_large = threading.Lock()


def _renew_lock() -> None:
    global _large
    _large = threading.Lock()


if hasattr(os, "register_at_fork"):
    # Another thread may have held it, which does not exist in the forked process.
    os.register_at_fork(after_in_child=_renew_lock)

# What the readers of Pillow's many versions let out on damaged files, where one exception would do.
_DECODER_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_KNOWN_DTYPES = "expected uint8, uint16 with max_value, or floating point in [0, 1]"

# Modes whose pixels are taken as they are: 8 bits in 1, 3 or 4 channels with R, G, B first.
_DIRECT_MODES = frozenset({"L", "RGB", "RGBA", "RGBX"})

# One step each. A palette goes by way of RGBA, for its transparency may stand in the palette.
_CONVERSIONS = {
    "1": ("L",),
    "LA": ("L",),
    "La": ("LA", "L"),
    "P": ("RGBA",),
    "PA": ("RGBA",),
    "RGBa": ("RGBA",),
    "CMYK": ("RGB",),
    "YCbCr": ("RGB",),
    "HSV": ("RGB",),
}

# Pillow's names for pixels of 16 bits a channel. In "BGR;16" the 16 bits are those of a whole pixel.
_SIXTEEN_BITS = re.compile(r";16[BLN]\b")


def check_decode_options(channel_order: str, max_value: int | None) -> None:
    """Refuses, with an :class:`InputError`, what :func:`decode_image` does not know."""
    if channel_order not in CHANNEL_ORDERS:
        raise InputError(f"channel_order is {channel_order!r}; expected 'rgb', or 'bgr' for arrays from OpenCV")
    if max_value is not None and (
        isinstance(max_value, bool) or not isinstance(max_value, int | np.integer) or not 1 <= max_value <= _UINT16_MAX
    ):
        raise InputError(
            f"max_value is {max_value!r}; expected an integer from 1 to 65535, the value that white has, such as "
            f"4095 for 12 bits"
        )


def decode_image(
    source: str | os.PathLike[str] | Image.Image | NDArray[np.generic] | Tensor,
    *,
    channel_order: str = "rgb",
    max_value: int | None = None,
    apply_exif: bool = False,
    channels_last: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Tensor:
    """Decode ``source`` to RGB.

    Args:
        source: one of

            - a path. The content decides what the file is, not its suffix; BMP, GIF, JPEG, JPEG 2000, PNG, PPM / PGM /
              PBM, TIFF and WebP are read. Of several frames or pages, the first is taken. A file that another program
              cuts short or removes meanwhile is a damaged one, and nothing worse.
            - a PIL image of any mode but LAB. It is left open.
            - a numpy array, ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels; any strides and byte order.
            - a torch tensor, ``(H, W)`` or ``(C, H, W)`` with 1, 3 or 4 channels, on any device.

            Arrays and tensors are uint8, uint16 or floating point in [0, 1]. Alpha is dropped, grey is repeated.
        channel_order: of arrays and tensors, ``"rgb"`` or ``"bgr"`` (OpenCV); files and PIL images know their own.
        max_value: what white is in 16-bit images, such as 4095 for a 12-bit camera. Arrays and tensors of uint16 need
            it; 16-bit files and PIL images have 65535 by default. 8-bit and floating-point images do not use it, nor
            do PGM files, whose header says it.
        apply_exif: turn files and PIL images as their EXIF orientation says. It is ignored otherwise, but for TIFF
            files, which Pillow turns itself while reading (as in the other implementations, which read with it).
        channels_last: lay the result out with its channels next to each other, as files hold them and the operator
            ``preprocess`` reads them.
        tell: called with a sentence where the result is not all that the file holds: it has further frames or pages.

    Returns:
        ``(3, H, W)``, contiguous or channels-last, on the CPU, never sharing memory with ``source``: uint8 for 8-bit
        sources, else float32 in [0, 1]. 16-bit grey keeps its precision; of 16-bit colour files Pillow keeps the upper
        8 bits. Colour profiles (ICC) are not applied, as the two other implementations do not.

    Raises:
        ImageError: the image cannot be read, or holds what is described nowhere above.
        InputError: ``channel_order`` or ``max_value`` is not one of the admitted values.
    """
    check_decode_options(channel_order, max_value)
    layout = _Layout(channel_order == "bgr", channels_last)
    if isinstance(source, Tensor):
        return _from_tensor(source, layout, max_value)
    if isinstance(source, np.ndarray):
        return _from_array(source, layout, max_value)
    if isinstance(source, Image.Image):
        file = getattr(source, "filename", "")
        name = f"PIL image {file}" if file else "PIL image"
        return _from_pillow(source, name, layout, max_value, apply_exif)
    if isinstance(source, str | os.PathLike):
        return _from_file(source, layout, max_value, apply_exif, tell)
    raise ImageError(
        f"an image is a {type(source).__name__}; expected a path, a PIL image, a numpy array or a torch tensor"
        + ("; open encoded bytes with PIL.Image.open(io.BytesIO(data))" if isinstance(source, bytes) else "")
    )


class _Layout(NamedTuple):
    """Of the channels: whether the source has them as B, G, R, and whether the result has them next to each other."""

    reverse: bool
    channels_last: bool


def _from_file(
    path: str | os.PathLike[str],
    layout: _Layout,
    max_value: int | None,
    apply_exif: bool,
    tell: Callable[[str], None] | None,
) -> Tensor:
    name = os.fsdecode(path) or "."
    with _opened(name) as file:
        try:
            image = _identified(file)
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{name}: not an image, of an unknown kind, or too damaged to tell; BMP, GIF, JPEG, JPEG 2000, PNG, "
                f"PPM, TIFF and WebP files are read, whatever their suffix"
            ) from error
        except _DECODER_FAILURES as error:
            raise _decoder_failure(name, error) from error
        with image:
            pixels = image.width * image.height
            most = min(MAX_PIXELS, _PIXELS_OF_FORMAT.get(image.format or "", MAX_PIXELS))
            if pixels > most:
                advice = (
                    ""
                    if most < MAX_PIXELS
                    else (", or raise efficientad_fast.data.decode.MAX_PIXELS where the file is trusted")
                )
                raise ImageError(
                    f"{name}: claims {image.width} x {image.height} pixels, more than the {most:,} that are taken; cut "
                    f"the image into parts{advice}"
                )
            if image.format in ("JPEG", "MPO") and _has_more_scans(file, MAX_SCANS):
                raise ImageError(
                    f"{name}: has more than {MAX_SCANS} scans, which cameras' files have not; save the image again"
                )
            with _large if pixels >= _LARGE_PIXELS else contextlib.nullcontext():
                decoded = _from_pillow(image, name, layout, max_value, apply_exif)
            if tell is not None and _has_more(image):
                tell(f"{name}: holds several frames or pages, of which the first was taken")
            return decoded


class _Unmapped(io.FileIO):
    """A file that keeps its descriptor to itself.

    Decoders that get it map the file into memory, and the process ends where another program cuts the file short.
    """

    def fileno(self) -> NoReturn:
        raise io.UnsupportedOperation("fileno")


def _opened(name: str) -> io.BufferedReader:
    """The regular file of that name, open for reading; never waits."""
    try:
        # Before it is opened, too: opening some devices does something.
        _check_regular(name, Path(name).stat())
        # What was a file a moment ago may be a pipe, which would wait for its writer.
        file = _Unmapped(os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)))
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file; check the path") from error
    except PermissionError as error:
        raise ImageError(f"{name}: permission denied; allow this user to read the file and its folder") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"{name!r}: not a usable path ({error}); give the path of an image file") from error
    try:
        status = os.fstat(io.FileIO.fileno(file))
        _check_regular(name, status)
        if status.st_size == 0:
            raise ImageError(f"{name}: the file is empty; copy or record it again")
    except BaseException:
        file.close()
        raise
    return io.BufferedReader(file)


def _check_regular(name: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{name}: is a folder; give the path of one image file")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is a pipe, socket or device; give the path of an image file")


def _identified(file: io.BufferedReader) -> ImageFile.ImageFile:
    """As ``Image.open(file, formats=FORMATS)``, but for its limit of pixels, which is one for the whole process.

    Raises:
        UnidentifiedImageError: none of the formats' readers knows it. Others: as the readers do.
    """
    Image.preinit()
    if not Image.OPEN.keys() >= set(FORMATS):
        Image.init()
    start = file.read(16)
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        try:
            accepted = factory is not None and (accepts is None or accepts(start))
            # Text in place of an answer says that Pillow was built without the reader.
            if factory is None or not accepted or isinstance(accepted, str):
                continue
            file.seek(0)
            # Without a name, for a reader that knows it maps the file into memory.
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise UnidentifiedImageError


def _has_more_scans(file: io.BufferedReader, most: int) -> bool:
    """Whether a JPEG file has more scans, up to its end. The file is left where it was."""
    before = file.seek(0, os.SEEK_CUR)
    file.seek(2)
    scans, data, at = 0, b"", 0

    def read_on() -> bool:
        nonlocal data, at
        more = file.read(2**20)
        data, at = data[at:] + more, 0
        return bool(more)

    try:
        while scans <= most:
            found = _JPEG_MARKER.search(data, at)
            if found is None:
                at = max(at, len(data) - 1)  # which may be a marker's first byte
                if not read_on():
                    break
                continue
            at = found.end()
            marker = data[at - 1]
            if marker == 0xD9:
                break
            if marker in (0x01, 0xD8):
                continue
            scans += marker == 0xDA
            if len(data) < at + 2:
                read_on()
            at += max(int.from_bytes(data[at : at + 2]), 2)
            if at > len(data):
                file.seek(at - len(data), os.SEEK_CUR)
                data, at = b"", 0
    finally:
        file.seek(before)
    return scans > most


def _has_more(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except _DECODER_FAILURES:
        # What comes behind the first frame is damaged, and not asked for.
        return False


def _decoder_failure(name: str, error: BaseException) -> ImageError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageError(
            f"{name}: more pixels in a frame or tile than Pillow takes ({error}); cut the image into parts, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS where the file is trusted"
        )
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: not enough memory for the decoded image; cut it into parts")
    return ImageError(
        f"{name}: truncated or damaged ({str(error) or type(error).__name__}); copy or record the file again"
    )


def _from_pillow(image: Image.Image, name: str, layout: _Layout, max_value: int | None, apply_exif: bool) -> Tensor:
    layout = layout._replace(reverse=False)  # Pillow knows
    # The description of the tiles is gone once the pixels are loaded.
    cut_to_8_bits = image.mode in _DIRECT_MODES | _CONVERSIONS.keys() and any(
        _SIXTEEN_BITS.search(str(tile[3])) for tile in getattr(image, "tile", ())
    )
    if cut_to_8_bits and max_value not in (None, _UINT16_MAX):
        raise ImageError(
            f"{name}: a 16-bit colour file, of which Pillow keeps the upper 8 bits, so max_value={max_value} cannot be "
            f"applied; read it with a library that keeps 16 bits and give the uint16 array"
        )
    try:
        image.load()
        if apply_exif and image.getexif().get(ExifTag.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.width == 0 or image.height == 0:
            raise ImageError(
                f"{name}: has no pixels (width {image.width}, height {image.height}); give an image that has"
            )
        if image.mode in _DIRECT_MODES or image.mode in _CONVERSIONS:
            return _from_bands(image, layout)
        pixels = np.asarray(image)
    except ImageError:
        raise
    except _DECODER_FAILURES as error:
        raise _decoder_failure(name, error) from error
    if image.mode == "F":
        return _from_floats(pixels, name, layout)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow has brought the values of a PGM file from its header's maximum to 65535.
        white = _UINT16_MAX if max_value is None or image.format == "PPM" else int(max_value)
        return _from_integers(pixels, name, white, layout)
    raise ImageError(f"{name}: has Pillow's mode {image.mode}; convert it with image.convert('RGB') or ImageCms first")


def _from_bands(image: Image.Image, layout: _Layout) -> Tensor:
    """An 8-bit image, some rows at a time."""
    target = _empty((image.height, image.width), torch.uint8, layout)
    into = target.numpy()
    for top, band in _bands(image):
        for mode in _CONVERSIONS.get(image.mode, ()):
            band = band.convert(mode)
        _copy(_planes(np.asarray(band), layout), into[:, top : top + band.height])
    return target


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Rows of an image with the number of the first; the image itself where it is small."""
    rows = max(_BAND_PIXELS // image.width, 1)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _from_tensor(tensor: Tensor, layout: _Layout, max_value: int | None) -> Tensor:
    if tensor.is_nested:
        raise ImageError("a nested tensor: give its images one by one, as in tensor.unbind()")
    name = f"tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise ImageError(f"{name}: is sparse, quantized or without data; expected a dense tensor that holds an image")
    if tensor.ndim == 4:
        raise ImageError(f"{name}: is a batch; give its images one by one, as in list(tensor) or tensor[0]")
    if tensor.ndim not in (2, 3):
        raise ImageError(f"{name}: expected (H, W), or (C, H, W) with 1, 3 or 4 channels")
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4):
        hint = "; turn (H, W, C) with tensor.permute(2, 0, 1)" if tensor.shape[2] in (1, 3, 4) else ""
        raise ImageError(f"{name}: expected (H, W), or (C, H, W) with 1, 3 or 4 channels{hint}")
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.to(torch.float32)
    try:
        array = tensor.numpy(force=True)
    except (RuntimeError, TypeError) as error:
        raise ImageError(f"{name}: {_KNOWN_DTYPES}; cast to the one that fits the values") from error
    return _from_pixels(array.transpose(1, 2, 0) if array.ndim == 3 else array, name, layout, max_value)


def _from_array(array: NDArray[np.generic], layout: _Layout, max_value: int | None) -> Tensor:
    name = f"array of shape {array.shape} and dtype {array.dtype}"
    if array.ndim == 4:
        raise ImageError(f"{name}: is a batch; give its images one by one, as in list(array) or array[0]")
    if array.ndim not in (2, 3):
        raise ImageError(f"{name}: expected (H, W), or (H, W, C) with 1, 3 or 4 channels")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        hint = "; turn (C, H, W) with array.transpose(1, 2, 0)" if array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name}: expected (H, W), or (H, W, C) with 1, 3 or 4 channels{hint}")
    return _from_pixels(array, name, layout, max_value)


def _from_pixels(pixels: NDArray[np.generic], name: str, layout: _Layout, max_value: int | None) -> Tensor:
    """``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels, of any dtype."""
    if pixels.size == 0:
        raise ImageError(f"{name}: has no pixels; give an image that has")
    kind, width = pixels.dtype.kind, pixels.dtype.itemsize
    if (kind, width) == ("u", 1):
        return _from_uint8(pixels, layout)
    if (kind, width) == ("u", 2):
        if max_value is None:
            raise ImageError(
                f"{name}: 16-bit pixels need max_value, the value that white has: 1023, 4095 or 65535 for a camera of "
                f"10, 12 or 16 bits"
            )
        return _from_integers(pixels, name, int(max_value), layout)
    if kind == "f":
        return _from_floats(pixels, name, layout)
    raise ImageError(
        f"{name}: {_KNOWN_DTYPES}"
        + ("; multiply a mask by 255 as uint8" if kind == "b" else "; cast to the one that fits the values")
    )


def _planes(pixels: NDArray[np.generic], layout: _Layout) -> NDArray[np.generic]:
    """A view ``(3, H, W)``, or ``(1, H, W)`` for grey, without alpha."""
    if pixels.ndim == 2:
        return pixels[None]
    colours = pixels[..., :3].transpose(2, 0, 1)
    return colours[::-1] if layout.reverse else colours


def _empty(size: tuple[int, int], dtype: torch.dtype, layout: _Layout) -> Tensor:
    height, width = size
    if layout.channels_last:
        return torch.empty((height, width, 3), dtype=dtype).permute(2, 0, 1)
    return torch.empty((3, height, width), dtype=dtype)


def _copy(planes: NDArray[np.generic], target: NDArray[np.generic]) -> None:
    if planes.strides == target.strides:
        target[...] = planes
    else:
        # At once, NumPy could take the three channels of a pixel for its inner loop.
        for plane, into in zip(np.broadcast_to(planes, target.shape), target, strict=True):
            into[...] = plane


def _from_uint8(pixels: NDArray[np.generic], layout: _Layout) -> Tensor:
    image = _empty(pixels.shape[:2], torch.uint8, layout)
    _copy(_planes(pixels, layout), image.numpy())
    return image


def _from_integers(pixels: NDArray[np.generic], name: str, white: int, layout: _Layout) -> Tensor:
    planes = _planes(pixels, layout)
    lowest, highest = int(planes.min()), int(planes.max())
    if lowest < 0 or highest > white:
        raise ImageError(
            f"{name}: values from {lowest} to {highest} where white (max_value) is {white}; expected 0 to {white}, so "
            f"state the max_value of the camera's bit depth"
        )
    image = _empty(pixels.shape[:2], torch.float32, layout)
    np.divide(planes, np.float32(white), out=image.numpy(), dtype=np.float32, casting="unsafe")
    return image


def _from_floats(pixels: NDArray[np.generic], name: str, layout: _Layout) -> Tensor:
    image = _empty(pixels.shape[:2], torch.float32, layout)
    with np.errstate(over="ignore"):
        _copy(_planes(pixels, layout), image.numpy())
    lowest, highest = float(image.amin()), float(image.amax())
    if not np.isfinite((lowest, highest)).all():
        raise ImageError(f"{name}: holds NaN or infinity; find out where they come from, or replace them")
    if lowest >= 0 and highest <= 1:
        return image
    if lowest >= 0 and 2 < highest <= 255:
        advice = "these look like 0 to 255, so divide by 255 or give them as uint8"
    elif lowest >= 0 and highest > 255:
        advice = "divide by the value that white has"
    else:
        advice = "clip what overshoots, and leave the normalisation by mean and standard deviation to the detector"
    raise ImageError(f"{name}: values from {lowest:.8g} to {highest:.8g}, expected [0, 1]; {advice}")
