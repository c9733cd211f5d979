"""Mamba-2 language models for Keras 3. Start at `Mamba2CausalLM.from_preset`.

Where Keras is not installed there is one thing: `load_programs`, for programs that were exported.
In `keras-mamba2 run-programs` too, which starts sooner without Keras.
"""

import importlib.util

from keras_mamba2.backend_choice import choose_backend
from keras_mamba2.backend_choice import report_other_backend
from keras_mamba2.command_process import leave_out_unused
from keras_mamba2.command_process import leaves_out_keras
from keras_mamba2.command_process import pause_garbage_collection
from keras_mamba2.command_process import resume_garbage_collection

choose_backend()
leave_out_unused()
pause_garbage_collection()

from keras_mamba2.portable import Programs as Programs
from keras_mamba2.portable import ProgramState as ProgramState
from keras_mamba2.portable import load_programs as load_programs

if importlib.util.find_spec("keras") is not None and not leaves_out_keras():
    from keras_mamba2 import layers as layers
    from keras_mamba2 import ops as ops
    from keras_mamba2 import training as training
    from keras_mamba2.chat import ChatTemplate as ChatTemplate
    from keras_mamba2.conversion import register as register
    from keras_mamba2.generation import DraftModel as DraftModel
    from keras_mamba2.generation import FilterSampler as FilterSampler
    from keras_mamba2.generation import PromptLookup as PromptLookup
    from keras_mamba2.models import Mamba2Backbone as Mamba2Backbone
    from keras_mamba2.models import Mamba2HybridBackbone as Mamba2HybridBackbone
    from keras_mamba2.models import Mamba2State as Mamba2State
    from keras_mamba2.models import Mamba2Tokenizer as Mamba2Tokenizer
    from keras_mamba2.tasks import ChatUsage as ChatUsage
    from keras_mamba2.tasks import Mamba2CausalLM as Mamba2CausalLM
    from keras_mamba2.tasks import Mamba2CausalLMPreprocessor as Mamba2CausalLMPreprocessor
    from keras_mamba2.tasks import Mamba2Chat as Mamba2Chat
    from keras_mamba2.tasks import Mamba2Forecaster as Mamba2Forecaster
    from keras_mamba2.tasks import Mamba2Session as Mamba2Session
    from keras_mamba2.tasks import Mamba2TextClassifier as Mamba2TextClassifier
    from keras_mamba2.tasks import (
        Mamba2TextClassifierPreprocessor as Mamba2TextClassifierPreprocessor,
    )

    report_other_backend()
else:

    def __getattr__(name: str):
        raise AttributeError(
            f"Without Keras, `keras_mamba2` has `load_programs`, and no `{name}`. Install the "
            "rest with `pip install keras-mamba2`."
        )


resume_garbage_collection()

__version__ = "0.1.0"
