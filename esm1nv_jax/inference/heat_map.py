"""A picture of the scores of every single mutant of a protein."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ORDER = "GAVLIMCPFWYSTNQHKRDE"  # by kind: small, aliphatic, aromatic, polar, charged
RESIDUES, LINES = 100, 40  # in a line; lines, of more residues if need be


def plot_heat_map(
    path: Path, wild_type: str, names: list[str], scores: np.ndarray, offset: int = 0
) -> None:
    """Writes a PNG of the scores of single mutants `names` of `wild_type`: residues across, amino
    acids down; dots mark the wild type's own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = max(RESIDUES, -(-len(wild_type) // LINES))
    tick = 10 * -(-across // RESIDUES)
    values = np.full((len(ORDER), len(wild_type)), np.nan)
    for name, score in zip(names, scores, strict=True):
        values[ORDER.index(name[-1]), int(name[1:-1]) - 1 - offset] = score
    lines = -(-len(wild_type) // across)
    figure = Figure(figsize=(16, 3.4 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    # Colours span what nine in ten mutants score; the rest would wash out the picture.
    span = float(np.nanpercentile(np.abs(values), 95)) or 1.0
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        first, last = line * across, min((line + 1) * across, len(wild_type))
        image = axes.imshow(
            values[:, first:last],
            cmap="RdBu",
            vmin=-span,
            vmax=span,
            aspect="auto",
            extent=(first - 0.5, last - 0.5, len(ORDER) - 0.5, -0.5),
            interpolation="nearest",
        )
        own = [(i, ORDER.index(wild_type[i])) for i in range(first, last) if wild_type[i] in ORDER]
        axes.plot(*zip(*own, strict=True), "k.", markersize=3) if own else None
        axes.set_xlim(first - 0.5, first + min(across, len(wild_type)) - 0.5)
        axes.set_yticks(range(len(ORDER)), ORDER, fontsize=6)
        ticks = [i for i in range(first, last) if (i + 1 + offset) % tick == 0]
        axes.set_xticks(ticks, [str(i + 1 + offset) for i in ticks])
        axes.set_facecolor("0.85")
    figure.supxlabel("residue")
    figure.colorbar(image, ax=figure.axes, label="score (higher is fitter)", fraction=0.02)
    figure.savefig(path, format="png", dpi=120)
