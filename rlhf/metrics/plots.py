"""The plots of an evaluation, as PNG files.

The same numbers give the same bytes: own style whatever the user's matplotlibrc says, the font that comes with
matplotlib, no date or version in the file. Colours are Okabe and Ito's, which colour-blind people can tell apart; each
policy has a hatch or line style of its own too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]


class Look(NamedTuple):
    """How one policy, one side of the preference pairs, or what a reward model was trained on, is drawn."""

    colour: str
    hatch: str
    line: str | tuple[float, Sequence[float]]


LOOKS = {
    "base": Look("#999999", "", ":"),
    "sft": Look("#0072B2", "//", "--"),
    "ppo": Look("#D55E00", "..", "-"),
    "reference": Look("#009E73", "xx", "-."),
    "training": Look("#CC79A7", "\\\\", (0, (5, 1, 1, 1, 1, 1))),
    "chosen": Look("#0072B2", "//", "-"),
    "rejected": Look("#D55E00", "..", "--"),
}
JUDGES = (LOOKS["sft"], LOOKS["reference"], LOOKS["training"], LOOKS["base"])  # one after the other; more are grey
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.6,
}


def boxplot(path: Path, panels: Mapping[str, Mapping[str, Floats]]) -> None:
    """A panel for each score: box from quartile to quartile, line at the median, whiskers at 5 and 95 %, diamond at the
    mean. ``panels`` maps a score's label to the values (n,) of each policy; NaN is left out."""
    with _figure(path, len(panels)) as axes:
        for ax, (label, groups) in zip(axes, _known(panels).items(), strict=True):
            boxes = ax.boxplot(
                list(groups.values()),
                orientation="horizontal",
                whis=(5, 95),
                showfliers=False,
                showmeans=True,
                widths=0.6,
                patch_artist=True,
                medianprops={"color": "black", "linewidth": 2},
                meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": "black"},
            )
            for box, name in zip(boxes["boxes"], groups, strict=True):
                box.set(facecolor=LOOKS[name].colour, hatch=LOOKS[name].hatch, alpha=0.75)
            ax.set_yticks(range(1, len(groups) + 1), list(groups))
            ax.invert_yaxis()
            ax.set_xlabel(label)


def histogram(path: Path, panels: Mapping[str, tuple[Sequence[float], Mapping[str, Sequence[int]]]]) -> None:
    """A panel for each score: the share of responses in each bin, as steps. ``panels`` maps a label to the bins' edges
    (b + 1) and each policy's counts (b,)."""
    with _figure(path, len(panels)) as axes:
        for ax, (label, (edges, groups)) in zip(axes, panels.items(), strict=True):
            for name, counts in groups.items():
                share = 100 * np.asarray(counts, dtype=np.float64) / max(1, sum(counts))
                look = LOOKS[name]
                ax.stairs(share, list(edges), label=name, color=look.colour, linestyle=look.line, linewidth=2.5)
            ax.set_xlabel(label)
            ax.set_ylabel("share of responses, %")
            ax.legend(frameon=False)


def curves(path: Path, steps: Sequence[int], panels: Mapping[str, Sequence[float]]) -> None:
    """A panel for each curve over PPO updates; ``panels`` maps its label to its values, one for each step."""
    from matplotlib.ticker import MaxNLocator

    with _figure(path, len(panels)) as axes:
        for ax, (label, values) in zip(axes, panels.items(), strict=True):
            ax.plot(list(steps), list(values), color=LOOKS["ppo"].colour, linewidth=2)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.set_xlabel("PPO update")
            ax.set_ylabel(label)


def overoptimisation(path: Path, kl: Sequence[float], series: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """What PPO is trained on, and judges that it never sees, over the distance from the reference policy, sqrt(KL).

    As Gao et al. 2023 (arXiv 2210.10760) draw it. Each of ``series``, the proxy first, has value, stderr and, where a
    judge has an alarm, alarm: lists of one number for each evaluation, as ``kl`` in nats is. So that they share an
    axis, each is drawn as its gain since the first evaluation, over its mean standard error; the band is one standard
    error wide on each side. A triangle is an evaluation at which the alarm was on.
    """
    root = np.sqrt(np.maximum(0.0, np.asarray(kl, dtype=np.float64)))
    order = np.argsort(root, kind="stable")
    looks = [LOOKS["ppo"], *JUDGES]
    with _figure(path, 1) as (ax,):
        for number, (name, of) in enumerate(series.items()):
            value, stderr = (np.asarray(of[key], dtype=np.float64) for key in ("value", "stderr"))
            known = stderr[np.isfinite(stderr) & (stderr > 0)]
            unit = known.mean() if len(known) else 1.0
            gain, error = (value - value[0])[order] / unit, stderr[order] / unit
            look = looks[min(number, len(JUDGES))]
            ax.plot(root[order], gain, label=name, color=look.colour, linestyle=look.line, linewidth=2.5, marker="o")
            ax.fill_between(root[order], gain - error, gain + error, color=look.colour, alpha=0.15, linewidth=0)
            alarm = np.asarray(of.get("alarm", np.zeros(len(value))))[order] > 0
            ax.plot(root[order][alarm], gain[alarm], color=look.colour, linestyle="", marker="v", markersize=14)
        if any(np.any(of.get("alarm", ())) for of in series.values()):
            ax.plot([], [], color="black", linestyle="", marker="v", markersize=10, label="over-optimised")
        ax.set_xlabel("\N{SQUARE ROOT}KL to the reference, the KL in nats per response")
        ax.set_ylabel("gain, in standard errors")
        ax.legend(frameon=False)


def reliability(path: Path, bins: Sequence[Mapping[str, float]]) -> None:
    """A reliability diagram: the share of pairs that came true over the probability that the model gave them, with the
    share's interval; on the dotted line, confidence is right. ``bins`` have confidence, right, low, high and pairs."""
    look = LOOKS["chosen"]
    confidence, right, low, high = (
        np.array([of[name] for of in bins]) for name in ("confidence", "right", "low", "high")
    )
    with _figure(path, 1) as (ax,):
        ax.plot([0, 1], [0, 1], color=LOOKS["base"].colour, linestyle=":", linewidth=2, label="perfectly calibrated")
        ax.errorbar(
            confidence,
            right,
            yerr=np.maximum(0.0, [right - low, high - right]),
            color=look.colour,
            marker="o",
            capsize=3,
            linewidth=2,
            label=f"reward model, {sum(int(of['pairs']) for of in bins)} held-out pairs",
        )
        ax.set_xlim(-0.02, 1.02)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("probability that the model gives to one side of a pair")
        ax.set_ylabel("share with this side chosen")
        ax.legend(frameon=False, loc="upper left")


@contextmanager
def _figure(path: Path, panels: int) -> Iterator[list[Axes]]:
    """Panels one below the other, written to ``path`` at the end. No pyplot: no global figure, no display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure: Figure = Figure(figsize=(7.5, 3.4 * max(1, panels)), layout="constrained")
        FigureCanvasAgg(figure)
        yield list(figure.subplots(max(1, panels), 1, squeeze=False)[:, 0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def _known(panels: Mapping[str, Mapping[str, Floats]]) -> dict[str, dict[str, Floats]]:
    return {
        label: {name: values[~np.isnan(values)] for name, values in groups.items()} for label, groups in panels.items()
    }
