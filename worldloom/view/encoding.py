"""Arrays and pictures as JSON: base64 of rounded numbers, and sheets of many small pictures.

`data.js` decodes both. Letters used in shapes: N pictures, H, W height and width.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, features

SHEET_PIXELS = 2**20  # of one sheet; browsers decode a sheet as a whole


def encode_array(values: Any, bits: int = 16) -> dict[str, Any]:
    """Round an array to `bits` (8 or 16) between its lowest and highest number.

    The last axis of an array with more than one has a range of its own at each index, so that
    small numbers of one dimension survive next to large ones of another. The largest code is NaN;
    infinity becomes NaN.
    """
    array = np.asarray(values, np.float64)
    array = np.where(np.isfinite(array), array, np.nan)
    top = 2**bits - 2
    rows = array.reshape(-1, array.shape[-1] if array.ndim > 1 else 1)
    known = np.isfinite(rows)
    low = np.where(known, rows, np.inf).min(0, initial=np.inf)
    high = np.where(known, rows, -np.inf).max(0, initial=-np.inf)
    low, high = (np.where(np.isfinite(x), x, 0.0) for x in (low, high))
    span = np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore"):
        codes = np.where(known, np.rint((rows - low) / span * top), top + 1)
    return {
        "shape": list(array.shape),
        "bits": bits,
        "low": low.tolist(),
        "high": (low + span).tolist(),
        "data": _encode(codes.astype(f"<u{bits // 8}").tobytes()),
    }


def encode_images(images: np.ndarray, quality: int) -> dict[str, Any]:
    """Encode pictures [N, H, W, 3] uint8 as sheets with pictures side by side.

    Sheets are WebP, or JPEG if Pillow lacks it. quality: from 1 to 100, of either.
    """
    count, height, width, _ = images.shape
    columns = max(1, min(count, 1024 // width))
    lines = max(1, SHEET_PIXELS // (columns * width * height))
    kind = "webp" if features.check("webp") else "jpeg"
    sheets = []
    for first in range(0, count, columns * lines):
        part = images[first : first + columns * lines]
        blank = -len(part) % columns
        part = np.concatenate([part, np.zeros((blank, *part.shape[1:]), np.uint8)])
        grid = part.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
        sheet = Image.fromarray(grid.reshape(-1, columns * width, 3))
        file = io.BytesIO()
        sheet.save(file, kind, quality=quality)
        sheets.append(f"data:image/{kind};base64,{_encode(file.getvalue())}")
    return {
        "count": count,
        "width": width,
        "height": height,
        "columns": columns,
        "lines": lines,
        "sheets": sheets,
    }


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
