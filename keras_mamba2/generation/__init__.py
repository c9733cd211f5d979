"""Generation from a state: the only place with compiled programs and stateless scopes.

A prompt is prefilled block by block (`prefill.py`). Then one compiled loop feeds the last
prompt token and every token after it (`decode.py`); each row picks tokens with its own sampling
parameters and random numbers (`picking.py`). `Generator` calls them. Samplers with a loop of
their own run as in KerasHub (`search.py`).
"""

from keras_mamba2.generation.generator import SCORING_SIZES as SCORING_SIZES
from keras_mamba2.generation.generator import Generator as Generator
from keras_mamba2.generation.generator import prompts_of as prompts_of
from keras_mamba2.generation.picking import needs_history as needs_history
from keras_mamba2.generation.picking import picks_tokens as picks_tokens
from keras_mamba2.generation.picking import row_parameters as row_parameters
from keras_mamba2.generation.picking import sampler_of as sampler_of
from keras_mamba2.generation.picking import sampling_of as sampling_of
from keras_mamba2.generation.programs import use_compilation_cache as use_compilation_cache
from keras_mamba2.generation.proposers import DraftModel as DraftModel
from keras_mamba2.generation.proposers import PromptLookup as PromptLookup
from keras_mamba2.generation.proposers import Proposer as Proposer
from keras_mamba2.generation.proposers import check_speculation as check_speculation
from keras_mamba2.generation.sampler import FilterSampler as FilterSampler
from keras_mamba2.generation.search import search as search
from keras_mamba2.host.decoding import Decoding as Decoding
from keras_mamba2.host.prompts import padded as padded
