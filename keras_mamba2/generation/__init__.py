"""Generation from a state: the only place with compiled programs and stateless scopes.

A prompt is prefilled block by block (`prefill.py`). Then one compiled loop feeds the last
prompt token and every token after it (`decode.py`); each row picks tokens with its own sampling
parameters and random numbers (`picking.py`). `Generator` calls them. Samplers with a loop of
their own run as in KerasHub (`search.py`).
"""

from keras_mamba2.generation.decode import NOT_FINITE as NOT_FINITE
from keras_mamba2.generation.decode import Likely as Likely
from keras_mamba2.generation.decoding import DECODE_CAPACITY as DECODE_CAPACITY
from keras_mamba2.generation.decoding import NOT_FINITE_REASON as NOT_FINITE_REASON
from keras_mamba2.generation.decoding import Decoding as Decoding
from keras_mamba2.generation.generator import Generator as Generator
from keras_mamba2.generation.generator import padded as padded
from keras_mamba2.generation.generator import prompts_of as prompts_of
from keras_mamba2.generation.picking import picks_tokens as picks_tokens
from keras_mamba2.generation.picking import sampler_of as sampler_of
from keras_mamba2.generation.picking import sampling_of as sampling_of
from keras_mamba2.generation.prefill import BLOCK_SIZES as BLOCK_SIZES
from keras_mamba2.generation.programs import use_compilation_cache as use_compilation_cache
from keras_mamba2.generation.rows import STOP_TOKEN_CAPACITY as STOP_TOKEN_CAPACITY
from keras_mamba2.generation.rows import Rows as Rows
from keras_mamba2.generation.sampler import FilterSampler as FilterSampler
from keras_mamba2.generation.search import search as search
