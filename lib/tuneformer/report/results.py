from dataclasses import dataclass
from typing import Any
import pandas as pd


@dataclass(frozen=True)
class Results:
    settings: Any
    runs: pd.DataFrame
    predictions: pd.DataFrame
    history: pd.DataFrame
    answer: dict
    folder: Any
