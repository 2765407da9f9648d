"""How good: losses, encoders, data and collections in every combination that a claim needs."""
