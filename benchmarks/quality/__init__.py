"""How good: losses, encoders, data and collections in every combination that a claim needs."""

from benchmarks.quality.development import DEVELOPMENT
from benchmarks.quality.earlier import EARLIER
from benchmarks.quality.earlier_development import EARLIER_DEVELOPMENT
from benchmarks.quality.reported import REPORTED

PLANS = {  # name, which is its folder's in results/, too -> plan
    "reported": REPORTED,
    "development": DEVELOPMENT,
    "earlier": EARLIER,
    "earlier-development": EARLIER_DEVELOPMENT,
}
