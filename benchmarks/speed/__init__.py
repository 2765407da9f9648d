"""How fast: training beside sentence-transformers, generation beside llama-cpp-python, losses beside other ways."""
