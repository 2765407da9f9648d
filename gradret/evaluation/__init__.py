"""Exact search and the measures of its rankings."""
