"""Generation from a fixed-size state: the only home of compilation and stateless scopes.

A prompt is prefilled block by block (`prefill.py`), then one compiled loop feeds the last
prompt token and every token after it (`decode.py`). `Generator` drives the two; samplers that
search with a loop of their own run as KerasHub runs them (`search.py`).
"""

from keras_mamba2.generation.generator import Generator as Generator
from keras_mamba2.generation.search import search as search
