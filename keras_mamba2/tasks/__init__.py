"""What a user calls: the language model, and what turns text into its inputs and back."""

from keras_mamba2.tasks.mamba2_causal_lm import Mamba2CausalLM as Mamba2CausalLM
from keras_mamba2.tasks.mamba2_causal_lm_preprocessor import (
    Mamba2CausalLMPreprocessor as Mamba2CausalLMPreprocessor,
)
from keras_mamba2.tasks.mamba2_session import Mamba2Session as Mamba2Session
