"""Writing graded lists with a language model."""
