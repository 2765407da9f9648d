"""Encoders: loading them, and what they make of texts."""
