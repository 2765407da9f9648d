"""The command line with a pause before each chunk of a step, or each block of a search: minutes, as large ones take.

Run as a process: argument 1 is a file to make when the first pause is reached, argument 2 what is slow, `steps`,
`search` or `mining`, the others are the command's.
"""

import sys
import time
from pathlib import Path

from gradret.cli import main
from gradret.evaluation import search
from gradret.train import loop, mining
from gradret.train.gradients import BatchGradients

PAUSE_S = 2.0
BLOCK = 8  # documents
reached, slow = Path(sys.argv.pop(1)), sys.argv.pop(1)


def delay(function):
    def run(*arguments):
        reached.touch()
        time.sleep(PAUSE_S)
        return function(*arguments)

    return run


def search_slowly(*arguments, **options):
    search._leftmost_top = delay(leftmost_top)
    return top_k(*arguments, block=BLOCK, **options)


loop.STEP_GRACE_S = 1.0  # for a signal to wait
leftmost_top, top_k = search._leftmost_top, search.top_k
if slow == "steps":
    BatchGradients._embed = delay(BatchGradients._embed)
elif slow == "search":
    search.top_k = search_slowly
else:
    mining.top_k = search_slowly
main()
