"""The command line with a pause before each chunk of a step: steps of minutes, as large batches have them.

Run as a process: argument 1 is a file to make when the first chunk is reached, the others are the command's.
"""

import sys
import time
from pathlib import Path

from gradret.cli import main
from gradret.contexts import Contexts

PAUSE_S = 2.0
reached = Path(sys.argv.pop(1))
embed = Contexts._embed


def embed_slowly(self, *arguments):
    reached.touch()
    time.sleep(PAUSE_S)
    return embed(self, *arguments)


Contexts._embed = embed_slowly
main()
