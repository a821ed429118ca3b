"""Write the shipped digits that no mock data provider hands out to an NPZ file, as rows of 784 pixels."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flops.mockdata.shipped import load_shipped

HANDED_OUT = 9_000  # the split "train"; what follows is the split "test"

if __name__ == "__main__":
    digits = load_shipped("mnist").slice(HANDED_OUT)
    images = [
        np.asarray(Image.open(io.BytesIO(cell["bytes"]))).ravel() for cell in digits["image"].to_pylist()
    ]
    np.savez(Path(sys.argv[1]), inputs=np.stack(images).astype(np.float64), label=digits["label"].to_numpy())
    print(f"{len(images)} digits in {Path(sys.argv[1]).name}")
