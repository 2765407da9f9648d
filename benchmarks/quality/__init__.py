"""How good: losses, encoders, data and collections in every combination that a claim needs."""

from benchmarks.quality.development import DEVELOPMENT
from benchmarks.quality.reported import REPORTED

PLANS = {"reported": ("quality", REPORTED), "development": ("dev", DEVELOPMENT)}  # name -> its folder in results/
