"""How good: losses, encoders, data and collections in every combination that a claim needs."""

from benchmarks.quality.development import DEVELOPMENT
from benchmarks.quality.reported import REPORTED

PLANS = {"reported": REPORTED, "development": DEVELOPMENT}  # by name, which is its folder's in results/, too
