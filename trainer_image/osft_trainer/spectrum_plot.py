"""A picture of a spectrum, PNG or SVG, where matplotlib is installed.

Called by `inspect`. Must never be imported where no plot is asked for: matplotlib is no dependency
of the trainer.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from osft_trainer.spectrum import Spectrum


def check(path: Path) -> None:
    """Refuse a plot that cannot be drawn, before the work is done.

    Raises:
        ValueError: another suffix than .png or .svg, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--plot: {path} must end in .png or .svg")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib: pip install matplotlib, or leave --plot out; the table says "
            "the same"
        ) from error


def plot(spectrum: Spectrum, path: Path) -> None:
    """Free energy by ratio and kind of target; beside it what zeroing costs. After `check`."""
    # Imported here because most installations have none.
    from matplotlib.figure import Figure

    with_loss = spectrum.loss is not None and spectrum.zeroed_loss is not None
    figure = Figure(figsize=(11 if with_loss else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if with_loss else 1, squeeze=False)[0]
    for name, shares in spectrum.by_kind().items():
        label = name.removeprefix("model.layers.*.")
        axes[0].plot(spectrum.ratios, [100 * share for share in shares], marker="o", label=label)
    axes[0].set(xlabel="unfreezeRankRatio", ylabel="energy in the free part, %")
    axes[0].legend(fontsize="small")
    if spectrum.loss is not None and spectrum.zeroed_loss is not None:
        more = [loss - spectrum.loss for loss in spectrum.zeroed_loss]
        axes[1].plot(spectrum.ratios, more, marker="o", color="black")
        axes[1].axhline(spectrum.tolerance, linestyle="--", color="gray", label="tolerance")
        if spectrum.recommended is not None:
            axes[1].axvline(spectrum.recommended, linestyle=":", color="gray", label="recommended")
        axes[1].set(xlabel="unfreezeRankRatio", ylabel="more loss with free parts zeroed, nats")
        axes[1].set_yscale("symlog", linthresh=spectrum.tolerance)
        axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=150)
