"""A server for one model: continuous batching behind OpenAI's API.

`engine.py` runs the model and knows no HTTP; `app.py` speaks HTTP and knows no arrays. What is
imported from here beside the engine needs the extra: `pip install "keras-mamba2[serve]"`.
"""
