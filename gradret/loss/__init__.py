"""Losses over graded lists, and the kernels behind them."""
