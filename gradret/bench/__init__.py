"""Benchmarks that users run: what training bought, and the speed of losses."""
