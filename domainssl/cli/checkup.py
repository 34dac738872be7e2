"""The checks of `doctor`."""

from __future__ import annotations

import importlib.util
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Row", "checkup"]

_EXTRAS = {
    "geo": ("zarr", "numcodecs", "xarray", "rasterio", "pyproj", "torchgeo"),
    "lmdb": ("lmdb",),
    "medical": ("monai", "nibabel", "pydicom", "gdcm", "nrrd", "pandas", "pyarrow"),
    "pathology": (
        "openslide",
        "tifffile",
        "imagecodecs",
        "h5py",
        "pandas",
        "pyarrow",
        "zarr",
        "shapely",
        "scipy",
    ),
    "finetune": ("segmentation_models_pytorch", "peft"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "hub": ("huggingface_hub",),
    "scale": ("dask", "distributed"),
}
_LOGGERS = {"wandb": "Weights & Biases", "mlflow": "MLflow"}
_MIN_FREE_GB = 1.0


@dataclass(frozen=True)
class Row:
    """One check: `ok`, `absent` (optional), `warning` or `broken`, and what to do."""

    status: str
    check: str
    found: str
    remedy: str = ""


def checkup() -> list[Row]:
    """Run all checks; a check that fails itself becomes a row."""
    parts: list[Callable[[], list[Row]]] = [
        _python,
        _required,
        _extras,
        _devices,
        _processes,
        _gdal,
        _dicom,
        _slides,
        _folders,
    ]
    return [row for part in parts for row in part()]


def _python() -> list[Row]:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Row("ok", "Python", found)]
    return [Row("broken", "Python", found, "Use Python 3.11, 3.12 or 3.13.")]


def _required() -> list[Row]:
    """Compare the installed versions with the bounds of our own metadata."""
    try:
        requirements = metadata.requires("domainssl") or []
    except metadata.PackageNotFoundError:
        remedy = "Install it from the repository: pip install -e '.[all]'"
        return [Row("warning", "domainssl", "runs from a folder, not installed", remedy)]
    rows = [Row("ok", "domainssl", metadata.version("domainssl"))]
    for line in requirements:
        if "extra ==" in line:
            continue
        name, bounds = _split_requirement(line)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            rows.append(Row("broken", name, "not installed", f"pip install '{name}{bounds}'"))
            continue
        fits = _fits(version, bounds)
        remedy = "" if fits else f"Tested with {bounds}: pip install '{name}{bounds}'"
        rows.append(Row("ok" if fits else "warning", name, version, remedy))
    return rows


def _split_requirement(line: str) -> tuple[str, str]:
    match = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*\(?([^;)]*)", line)
    assert match is not None
    return match.group(1), match.group(2).strip()


def _fits(version: str, bounds: str) -> bool:
    """Compare release numbers; pre-release and local parts are ignored."""

    def numbers(text: str) -> list[int]:
        release = re.match(r"[0-9.]*", text.strip())
        parts = [int(part) for part in (release.group() if release else "").split(".") if part]
        return (parts + [0] * 4)[:4]

    compare: dict[str, Callable[[list[int], list[int]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
    }
    for bound in filter(None, bounds.split(",")):
        match = re.match(r"\s*(>=|<=|==|!=|<|>)\s*(.+)", bound)
        if match and not compare[match.group(1)](numbers(version), numbers(match.group(2))):
            return False
    return True


def _unfit(extra: str) -> list[tuple[str, str, str]]:
    """Return name, version and bounds of the extra's packages that are installed but do not fit."""
    try:
        requirements = metadata.requires("domainssl") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in requirements:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra\s*==\s*['"]{extra}['"]""", marker):
            continue
        name, bounds = _split_requirement(requirement)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # told as missing
        if not _fits(version, bounds):
            found.append((name, version, bounds))
    return found


def _extras() -> list[Row]:
    rows = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        other = _unfit(extra)
        if missing:
            remedy = f"Only if you need it: pip install 'domainssl[{extra}]'"
            rows.append(Row("absent", f"extra {extra}", f"without {', '.join(missing)}", remedy))
        elif other:
            found = ", ".join(f"{name} {version}" for name, version, _ in other)
            bounds = " ".join(f"'{name}{bounds}'" for name, _, bounds in other)
            rows.append(
                Row("warning", f"extra {extra}", found, f"Tested with: pip install {bounds}")
            )
        else:
            rows.append(Row("ok", f"extra {extra}", "installed"))
    for module, title in _LOGGERS.items():
        if importlib.util.find_spec(module) is None:
            remedy = f"Only to log there: pip install {module}"
            rows.append(Row("absent", f"logger {title}", "not installed", remedy))
        else:
            rows.append(Row("ok", f"logger {title}", "installed"))
    return rows


def _devices() -> list[Row]:
    import torch

    from domainssl.pieces import cores

    rows = [Row("ok", "CPU", f"{cores()} cores, {torch.get_num_threads()} threads in torch")]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        remedy = "Fine for the sample; to train on a GPU check the driver with nvidia-smi."
        if built is None:
            remedy = "This torch is built for CPUs; install a CUDA build to use a GPU."
        rows.append(Row("absent", "GPU", f"none usable (torch built for CUDA: {built})", remedy))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        free, total = (value / 2**30 for value in torch.cuda.mem_get_info(index))
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use 16-mixed"
        found = f"{facts.name}, {free:.0f} of {total:.0f} GiB free, {bf16}"
        rows.append(Row("ok", f"GPU {index}", found))
    backends = [
        name
        for name, check in (
            ("gloo", torch.distributed.is_gloo_available),
            ("nccl", torch.distributed.is_nccl_available),
        )
        if torch.distributed.is_available() and check()
    ]
    rows.append(
        Row(
            "ok" if backends else "warning",
            "distributed",
            ", ".join(backends) or "none",
            "" if backends else "Several devices need a torch with gloo or nccl.",
        )
    )
    return rows


def _processes() -> list[Row]:
    method = multiprocessing.get_start_method(allow_none=True)
    method = method or multiprocessing.get_all_start_methods()[0]
    rows = [Row("ok", "start method", f"{method} by default; loading workers choose their own")]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        enough = free >= _MIN_FREE_GB
        remedy = "" if enough else "Workers pass batches through it: enlarge it (--shm-size)."
        rows.append(Row("ok" if enough else "warning", "/dev/shm", f"{free:.1f} GiB free", remedy))
    return rows


def _gdal() -> list[Row]:
    if importlib.util.find_spec("rasterio") is None:
        remedy = "To read GeoTIFF: pip install 'domainssl[geo]'"
        return [Row("absent", "GDAL", "rasterio is not installed", remedy)]
    try:
        import rasterio
        from rasterio.crs import CRS

        CRS.from_epsg(32632)
    except Exception as error:  # broken binary wheels and PROJ data fail in many ways
        remedy = "Unset GDAL_DATA and PROJ_LIB/PROJ_DATA of other installations, or reinstall."
        return [Row("broken", "GDAL", f"{type(error).__name__}: {error}", remedy)]
    return [Row("ok", "GDAL", f"{rasterio.__gdal_version__}, rasterio {rasterio.__version__}")]


def _dicom() -> list[Row]:
    """Check what decodes the compressed pixels of DICOM files."""
    if importlib.util.find_spec("pydicom") is None:
        return []  # told with the extra
    from pydicom.pixels import get_decoder
    from pydicom.uid import (
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    )

    syntaxes = {"JPEG": JPEGBaseline8Bit, "JPEG Lossless": JPEGLosslessSV1,
                "JPEG-LS": JPEGLSLossless, "JPEG 2000": JPEG2000Lossless,
                "RLE": RLELossless}  # fmt: skip
    missing = [name for name, uid in syntaxes.items() if not get_decoder(uid).is_available]
    if missing:
        remedy = "To read them: pip install 'domainssl[medical]' (python-gdcm)"
        return [Row("warning", "DICOM decoders", f"without {', '.join(missing)}", remedy)]
    return [Row("ok", "DICOM decoders", ", ".join(syntaxes))]


def _slides() -> list[Row]:
    """Check the C library of OpenSlide, and what decodes the tiles that tifffile reads."""
    if importlib.util.find_spec("openslide") is None:
        return []  # told with the extra
    try:
        import openslide
        from imagecodecs import JPEG, JPEG2K, LZW, ZLIB, ZSTD
    except (ImportError, OSError, AttributeError) as error:  # a missing C library too
        remedy = "pip install 'domainssl[pathology]' brings it (openslide-bin, imagecodecs)"
        return [Row("warning", "slides", f"{type(error).__name__}: {error}", remedy)]
    codecs: dict[str, Any] = {
        "JPEG": JPEG,
        "JPEG 2000": JPEG2K,
        "LZW": LZW,
        "deflate": ZLIB,
        "zstd": ZSTD,
    }
    missing = [name for name, codec in codecs.items() if not codec.available]
    found = f"OpenSlide {openslide.__library_version__}"
    if missing:
        remedy = "Reinstall imagecodecs: pip install --force-reinstall imagecodecs"
        return [Row("warning", "slides", f"{found}, without {', '.join(missing)}", remedy)]
    return [Row("ok", "slides", f"{found}; tifffile with {', '.join(codecs)}")]


def _folders() -> list[Row]:
    from domainssl.cache import cache_dir

    rows = [_writable("cache", Path(cache_dir()), "Set DOMAINSSL_CACHE to a writable folder.")]
    rows.append(_writable("runs", Path.cwd(), "Start from a writable folder, or pass --run_dir."))
    return rows


def _writable(check: str, folder: Path, remedy: str) -> Row:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Row("broken", check, f"{folder} is not writable: {error}", remedy)
    if free < _MIN_FREE_GB:
        found = f"{folder}, {free:.2f} GiB free"
        return Row("warning", check, found, f"The disk is nearly full. {remedy}")
    return Row("ok", check, f"{folder}, {free:.0f} GiB free")
