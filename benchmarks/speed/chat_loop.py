"""One reply after the other through llama-cpp-python's high-level class, in a process of its own.

A script that knows nothing of gradret has OpenMP wait as it does by default, and so does this one. Of standard input
the first line says what to load, each other one is a request, for which standard output gets a line with its tokens.
"""

import json
import sys
from unittest.mock import patch

from llama_cpp import Llama, LlamaGrammar, llama_cpp  # before gradret, which sets how OpenMP waits

from gradret.generate.llama import TOP_K, make_parameters


def main() -> None:
    """Load the model that the first line names, then answer each line."""
    loading = json.loads(sys.stdin.readline())
    sampling = loading.pop("sampling")
    parameters = make_parameters()
    # Llama has no option for them, and both sides are to load the model alike.
    with patch.object(llama_cpp, "llama_model_default_params", lambda: parameters):
        llama = Llama(**loading, verbose=False)
    for line in sys.stdin:
        request = json.loads(line)
        grammar = request.pop("grammar")
        held = LlamaGrammar.from_string(grammar, verbose=False) if grammar else None
        answer = llama.create_chat_completion(**request, **sampling, top_k=TOP_K, min_p=0.0, grammar=held)
        print(json.dumps(answer["usage"]), flush=True)


if __name__ == "__main__":
    main()
