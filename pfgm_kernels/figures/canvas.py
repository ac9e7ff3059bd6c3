# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: colours and letters, the sheet they are drawn on, and their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from pfgm_kernels.files import write_bytes

FORMATS = ("png", "svg")
DPI = 110
COLORS = 256

INK, GREY, PALE = "#22303f", "#7b8794", "#d5dce4"
BLUE, RED, GOLD, GREEN = "#2f5597", "#d1495b", "#e9a23b", "#2a8c82"
SERIES = (RED, GOLD, GREEN, BLUE, "#6c4a8b", GREY)
SKY = LinearSegmentedColormap.from_list("sky", ["#ffffff", "#e6eef7", "#bcd0e8", "#86a9d2"])
DUSK = LinearSegmentedColormap.from_list("dusk", [RED, GOLD, GREEN, BLUE, "#1c2b4a"])

STYLE: Any = {  # matplotlib lists the keys of its type one by one
    "axes.edgecolor": GREY,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlesize": 13,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "image.interpolation": "nearest",
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "mathtext.fontset": "dejavuserif",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "pfgm",
    "text.color": INK,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 10.5,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 10.5,
}


@contextmanager
def style() -> Iterator[None]:
    """The same letters, lines and colours in all that is drawn and saved within."""
    with rc_context(STYLE):
        yield


def sheet(width: float, height: float) -> Figure:
    """A figure of so many inches, without a window system or a place in pyplot's list."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, dpi: float = DPI) -> None:
    """As the ending of the file's name says, one of `FORMATS`; the same bytes each time."""
    drawn = BytesIO()
    if path.suffix == ".svg":
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    else:
        picture = BytesIO()
        figure.savefig(picture, format="png", dpi=dpi)
        # A palette makes the file a third as large as full colour.
        Image.open(picture).convert("RGB").quantize(COLORS).save(drawn, "PNG", optimize=True)
    write_bytes(path, drawn.getvalue())
