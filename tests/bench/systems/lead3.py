"""ROUGE of the lead-3 baseline on DialogSum: the first three turns of each dialogue as its summary.

python lead3.py DEV.parquet   # columns dialogue, summary
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd

from rlhf import metrics


def main() -> None:
    rows = pd.read_parquet(sys.argv[1])
    leads = [" ".join(dialogue.splitlines()[:3]) for dialogue in rows.dialogue]
    found = {name: round(float(np.nanmean(values)), 4) for name, values in metrics.rouge(leads, rows.summary).items()}
    print(json.dumps({"dialogues": len(rows)} | found))


if __name__ == "__main__":
    main()
