"""The classes that users call: language models, classifiers, forecasters, preprocessors."""

from keras_mamba2.host.session import Mamba2Session as Mamba2Session
from keras_mamba2.tasks.mamba2_causal_lm import Mamba2CausalLM as Mamba2CausalLM
from keras_mamba2.tasks.mamba2_causal_lm_preprocessor import (
    Mamba2CausalLMPreprocessor as Mamba2CausalLMPreprocessor,
)
from keras_mamba2.tasks.mamba2_chat import ChatUsage as ChatUsage
from keras_mamba2.tasks.mamba2_chat import Mamba2Chat as Mamba2Chat
from keras_mamba2.tasks.mamba2_forecaster import Mamba2Forecaster as Mamba2Forecaster
from keras_mamba2.tasks.mamba2_text_classifier import Mamba2TextClassifier as Mamba2TextClassifier
from keras_mamba2.tasks.mamba2_text_classifier_preprocessor import (
    Mamba2TextClassifierPreprocessor as Mamba2TextClassifierPreprocessor,
)
