import pytest

import keras_mamba2
from keras_mamba2.serving.engine import Engine


@pytest.fixture(scope="session")
def lm(preset_folder):
    lm = keras_mamba2.Mamba2CausalLM.from_preset(preset_folder)
    lm.compile(sampler=keras_mamba2.FilterSampler())
    return lm


@pytest.fixture(scope="session")
def engine(lm):
    engine = Engine(lm, max_sequences=4, max_tokens=4096, block_size=64)
    engine.start()
    yield engine
    engine.close()
