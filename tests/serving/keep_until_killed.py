"""Keeps states in a folder until it is killed: `python keep_until_killed.py PRESET FOLDER`."""

import pathlib
import sys
import time

import numpy as np

import keras_mamba2
from keras_mamba2.serving.prefix_cache import PrefixCache
from keras_mamba2.state import Mamba2State

preset, folder = sys.argv[1:]
backbone = keras_mamba2.Mamba2Backbone.from_preset(preset)
empty = backbone.initial_state(1)
# Few of them: most are written, removed, and written again.
cache = PrefixCache(backbone, 5 * empty.nbytes, pathlib.Path(folder), shortest=4)
for number in range(1_000_000):
    text = np.arange(number % 50, number % 50 + 20, dtype="int32")
    length = np.array([len(text)], "int32")
    cache.add(text, Mamba2State(empty.layers, empty.token, length, empty.digest))
    time.sleep(0.002)
    if number == 100:
        while not list(pathlib.Path(folder).glob("*/*.safetensors")):
            pass
        print("written", flush=True)
