"""A reply's sampling in llama.cpp: its own random stream, and its form held by a grammar."""

import ctypes
from dataclasses import dataclass

import numpy as np

from gradret.llama_model import LlamaModel, api
from gradret.llm import Form

TOP_K = 40  # llama.cpp's own default
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
RANDOM_SEED = 0xFFFFFFFF  # asks llama.cpp for a seed of its choice


@dataclass(frozen=True)
class Sampling:
    """The most likely TOP_K tokens, of these the fewest that hold top_p, at a temperature; 0 takes the likeliest."""

    temperature: float = 0.8
    top_p: float = 0.95


class LlamaSampler:
    """Samples one reply.

    The grammar is asked about the sampled token alone; only when it refuses is the whole vocabulary constrained and
    sampled from again, since that costs as much as a small model's decoding.
    """

    def __init__(self, model: LlamaModel, sampling: Sampling, seed: int, form: Form | None):
        self._model = model
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if sampling.temperature > 0:
            for step in (
                api.llama_sampler_init_top_k(TOP_K),
                api.llama_sampler_init_top_p(sampling.top_p, 1),
                api.llama_sampler_init_temp(sampling.temperature),
                api.llama_sampler_init_dist(seed % RANDOM_SEED),
            ):
                api.llama_sampler_chain_add(self._chain, step)
        else:
            api.llama_sampler_chain_add(self._chain, api.llama_sampler_init_greedy())
        self._grammar = api.llama_sampler_clone(model.parse_grammar(form.grammar)) if form else None

    def sample(self, context, row: int) -> int:
        """The next token after a row of the last batch."""
        token = api.llama_sampler_sample(self._chain, context, row)
        if self._grammar is None:
            return token
        if not self._allows(token):
            token = self._sample_allowed(context, row)
        if not api.llama_vocab_is_eog(self._model.vocab, token):
            api.llama_sampler_accept(self._grammar, token)
        return token

    def _allows(self, token: int) -> bool:
        one = np.array([(token, 0, 0)], CANDIDATE)
        api.llama_sampler_apply(self._grammar, ctypes.byref(_as_candidates(one)))
        return one["logit"][0] == 0

    def _sample_allowed(self, context, row: int) -> int:
        every = np.zeros(self._model.vocabulary_size, CANDIDATE)
        every["id"] = np.arange(len(every))
        every["logit"] = self._model.read_logits(context, row)
        candidates = _as_candidates(every)
        api.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        api.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def close(self) -> None:
        """Free what llama.cpp holds."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                api.llama_sampler_free(sampler)
        self._chain = self._grammar = None


def _as_candidates(array: np.ndarray) -> "api.llama_token_data_array":
    """llama.cpp's view of the array, which must outlive it."""
    data = array.ctypes.data_as(api.llama_token_data_p)
    return api.llama_token_data_array(data, len(array), -1, False)
