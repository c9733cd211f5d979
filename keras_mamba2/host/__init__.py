"""The host's part of generation, for models and for exported programs: numpy, and no Keras."""
