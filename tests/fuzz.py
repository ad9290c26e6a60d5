"""Inputs drawn to break what reads them: ``python -m tests.fuzz image|weights|array --seconds 600``.

With atheris installed, its coverage of Pillow's readers and of this package guides what is drawn; without, inputs are
mutations at random, which finds less. A reader may refuse an input with an error of this package, and nothing else: no
other exception, no hang, no process started, no file written. An input that breaks that is kept in a file whose name is
printed; give it as ``--input FILE`` to see it again.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import atheris

    _instrumented: Any = atheris.instrument_imports(include=["PIL", "efficientad_fast"])
except ImportError:
    atheris = None
    _instrumented = contextlib.nullcontext()

with _instrumented:
    from PIL import Image

    # Its readers are modules as well.
    Image.init()

    from efficientad_fast import Detector
    from efficientad_fast.data import decode
    from efficientad_fast.errors import EfficientADError, ImageError, InputError
    from efficientad_fast.files import read_tensors, write_tensors
    from efficientad_fast.interop import loading  # noqa: F401  imported when it is needed, else
    from efficientad_fast.training.state import read_state
    from efficientad_fast.weights import load_teacher

import numpy as np
import torch

from tests.small_detector import small_detector

HANG_SECONDS = 30
LONGEST = 2**16
"""Bytes of an input."""

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.",
    "ctypes.dlopen",
    "webbrowser.",
)


class Target:
    """What reads inputs. Each has seeds to begin from, and a method that raises where an input breaks it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        raise NotImplementedError

    def read(self, data: bytes) -> None:
        raise NotImplementedError


class ImageTarget(Target):
    """Files of any content; the first byte chooses how they are read."""

    def seeds(self) -> list[bytes]:
        pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[0x0112] = 6
        written: list[tuple[str, Image.Image, dict[str, Any]]] = [
            *((name, image, {}) for name in decode.FORMATS),
            *(("TIFF", image, {"compression": one}) for one in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")),
            *(("PNG", image.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
            ("JPEG", image, {"exif": exif, "progressive": True, "icc_profile": b"profile"}),
            ("JPEG", image.convert("CMYK"), {}),
            ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
            ("PNG", image, {"save_all": True, "append_images": [image.rotate(90)]}),
            ("TIFF", image.convert("F"), {}),
        ]
        found = []
        for name, one, options in written:
            buffer = io.BytesIO()
            one.save(buffer, name, **options)
            found += [b"\0" + buffer.getvalue(), b"\3" + buffer.getvalue()]
        return found

    def read(self, data: bytes) -> None:
        how = data[0] if data else 0
        path = self.folder / "image.png"
        path.write_bytes(data[1:])
        try:
            image = decode.decode_image(
                path,
                apply_exif=bool(how & 1),
                channels_last=bool(how & 2),
                max_value=4095 if how & 4 else None,
                tell=lambda note: None,
            )
        except ImageError as error:
            assert "image.png" in str(error)
            return
        assert image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
        assert image.dtype == torch.uint8 or (
            image.dtype == torch.float32 and bool(((image >= 0) & (image <= 1)).all())
        )


class WeightsTarget(Target):
    """Files of tensors and of torch.save, whole ones and the description in a detector's file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.detector = folder / "detector.safetensors"
        small_detector().save(self.detector)
        self.tensors, self.metadata = read_tensors(self.detector)
        content = self.detector.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        self.header, self.values = json.loads(content[8:start]), content[start:]

    def seeds(self) -> list[bytes]:
        path = self.folder / "seed"
        found = [b"\0" + self.metadata["detector"].encode()]
        write_tensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"format": "efficientad_fast detector 1"})
        found.append(b"\1" + path.read_bytes())
        write_tensors(path, {"a": torch.arange(3.0)}, {"step": "1", "run": "{}", "files": "{}"})
        found.append(b"\2" + path.read_bytes())
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 2), torch.nn.ReLU(), torch.nn.AvgPool2d(2))
        checkpoint = {
            "state_dict": {"model.teacher.conv1.weight": torch.ones(2, 3, 4, 4)},
            "hyper_parameters": {"a": 1},
        }
        for content in (network, network.state_dict(), checkpoint):
            for zipped in (True, False):
                torch.save(content, path, _use_new_zipfile_serialization=zipped)
                found += [bytes([kind]) + path.read_bytes() for kind in (1, 3)]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("archive/data.pkl", b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.")
            file.writestr("archive/byteorder", "little")
        found.append(b"\1" + path.read_bytes())
        return found

    def read(self, data: bytes) -> None:
        kind, content = (data[0] if data else 0) % 4, data[1:]
        path = self.folder / "weights.safetensors"
        if kind == 0:
            text = content.decode(errors="replace")
            header = json.dumps({**self.header, "__metadata__": {**self.metadata, "detector": text}}).encode()
            content = len(header).to_bytes(8, "little") + header + self.values
        path.write_bytes(content)
        readers: list[Callable[[Path], Any]] = [Detector.load, Detector.load, read_state, load_teacher]
        try:
            found = readers[kind](path)
        except EfficientADError:
            return
        if isinstance(found, Detector):
            found.summary()


class ArrayTarget(Target):
    """Arrays and tensors: the first bytes choose dtype, shape, layout and options, the others are the values."""

    KINDS = (
        "u1",
        "<u2",
        ">u2",
        "i1",
        "<i2",
        "<i4",
        "<i8",
        "<f2",
        "<f4",
        ">f4",
        "<f8",
        "?",
        "<c8",
        "S1",
        "U1",
        "<M8[s]",
        "O",
    )
    SHAPES = (
        (4, 5),
        (4, 5, 3),
        (3, 4, 5),
        (4, 5, 1),
        (4, 5, 4),
        (4, 5, 2),
        (0, 5),
        (4, 0, 3),
        (),
        (60,),
        (1, 4, 5, 3),
        (1, 1),
    )

    def seeds(self) -> list[bytes]:
        values = bytes(range(240)) * 4
        floats = np.linspace(0, 1, 60, dtype=np.float32).tobytes() * 4
        return [
            bytes([kind, shape, how]) + one
            for kind in range(17)
            for shape in (0, 1, 4)
            for how, one in ((0, values), (5, floats))
        ]

    def read(self, data: bytes) -> None:
        kind, shape, how = data[:3].ljust(3, b"\0")
        dtype = np.dtype(self.KINDS[kind % len(self.KINDS)])
        size = self.SHAPES[shape % len(self.SHAPES)]
        count = int(np.prod(size))
        if dtype.kind == "O":
            array = np.full(size, None)
        else:
            values = data[3:].ljust(count * dtype.itemsize, b"\1")[: count * dtype.itemsize]
            array = np.frombuffer(values, dtype).reshape(size)
        array = np.asfortranarray(array) if how & 1 else array
        array = array[::-1] if how & 2 and array.ndim else array
        source: Any = array
        if how & 4:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with contextlib.suppress(TypeError, ValueError):
                    source = torch.from_numpy(array)
        before = array.tobytes()
        try:
            image = decode.decode_image(
                source,
                channel_order="bgr" if how & 8 else "rgb",
                max_value=(None, 1, 1023, 65535)[how >> 4 & 3],
                channels_last=bool(how & 64),
            )
        except InputError:
            image = None
        assert array.tobytes() == before
        if image is not None:
            assert image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
            assert image.dtype == torch.uint8 or bool(((image >= 0) & (image <= 1)).all())


TARGETS: dict[str, type[Target]] = {"image": ImageTarget, "weights": WeightsTarget, "array": ArrayTarget}


def watch_events(folder: Path) -> None:
    """From now on, what a reader must not do ends the process. Python reports such events before they happen."""

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        written = name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        written = written or (name == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))
        outside = written and not os.path.abspath(str(arguments[0])).startswith((f"{folder}/", "/dev/"))  # noqa: PTH100
        if name.startswith(FORBIDDEN) or outside:
            raise AssertionError(f"a reader did {name} {arguments}")

    sys.addaudithook(event)


def mutated(data: bytes, draw: random.Random, seeds: list[bytes]) -> bytes:
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place = draw.randrange(len(result) + 1)
        # Headers matter most.
        place = min(place, draw.randrange(64)) if draw.random() < 0.5 else place
        length = draw.choice((1, 1, 2, 4, 64))
        how = draw.randrange(6)
        if how == 0:
            result[place : place + length] = draw.randbytes(length)
        elif how == 1:
            result[place:place] = draw.randbytes(length)
        elif how == 2:
            del result[place : place + length]
        elif how == 3:
            result[place : place + 4] = draw.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0")
            )
        elif how == 4:
            other = draw.choice(seeds)
            start = draw.randrange(len(other) + 1)
            result[place : place + length] = other[start : start + draw.choice((4, 64, 1024))]
        elif result:
            del result[draw.randrange(len(result)) :]
    return bytes(result[:LONGEST])


def run_mutations(target: Target, seconds: float, seed: int, kept: Path) -> int:
    """Inputs that were read; raises at the first that breaks the target."""
    draw, seeds, count = random.Random(seed), target.seeds(), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(draw.choice(seeds), draw, seeds)
        count += 1
        try:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            target.read(data)
        except BaseException:
            kept.write_bytes(data)
            print(f"this input broke it: {kept}", flush=True)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of what is drawn without atheris")
    parser.add_argument("--input", type=Path, help="read this one input, and nothing else")
    parser.add_argument("--without-atheris", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="efficientad_fast-fuzz-"))
    target = TARGETS[options.target](folder)
    for seed in [options.input.read_bytes()] if options.input else target.seeds():
        target.read(seed)
    if options.input:
        return
    kept = Path(tempfile.gettempdir()) / f"fuzz-{options.target}-{options.seed}"
    if atheris is None or options.without_atheris:
        print(f"{options.target}: random mutations, seed {options.seed}, {options.seconds} s", flush=True)
        watch_events(folder)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        print(f"{options.target}: {run_mutations(target, options.seconds, options.seed, kept)} inputs, none broke it")
        return
    corpus = folder / "corpus"
    corpus.mkdir()
    for index, seed in enumerate(target.seeds()):
        (corpus / f"{index:03d}").write_bytes(seed)
    limits = [f"-max_total_time={options.seconds}", f"-max_len={LONGEST}", f"-timeout={HANG_SECONDS}"]
    atheris.Setup(
        [sys.argv[0], *limits, "-rss_limit_mb=6000", "-print_final_stats=1", f"-artifact_prefix={kept}-", str(corpus)],
        target.read,
    )
    watch_events(corpus.parent)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
