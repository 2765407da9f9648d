"""What gradret's published figures are made by. Not installed: run from the repository, `python -m benchmarks.NAME`."""
