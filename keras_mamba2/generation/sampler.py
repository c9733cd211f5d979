import keras
import keras_hub
from keras import ops


class FilterSampler(keras_hub.samplers.Sampler):
    """Draws from the likeliest tokens, by any of the usual filters together.

    In this order: the repetition penalty, the temperature, `top_k`, `top_p`, `min_p`. Each filter
    sees the probabilities that the one before has left, scaled to sum to 1.

    Args:
        temperature: float, below 1 safer, above 1 wilder; 0 takes the likeliest token always.
        top_k: int, keeps so many of the likeliest tokens. `None` keeps all.
        top_p: float in (0, 1], keeps the fewest likeliest tokens that sum to it. `None` for all.
        min_p: float in [0, 1], keeps tokens at least this times as likely as the likeliest.
            `None` for all.
        repetition_penalty: float >= 1. Logits of tokens that the text has had, the prompt's too,
            are divided by it where they are positive, and multiplied where they are negative.
        seed: int, for the random numbers.

    Example:
    ```python
    lm.compile(sampler=keras_mamba2.FilterSampler(temperature=0.8, min_p=0.05, seed=1))
    ```

    Reference:
        - [min-p, 2024](https://arxiv.org/abs/2407.01082)
        - [CTRL, 2019, the penalty](https://arxiv.org/abs/1909.05858)
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ):
        for name, value, is_valid in (
            ("temperature", temperature, temperature >= 0),
            ("top_k", top_k, top_k is None or top_k >= 1),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1),
            ("min_p", min_p, min_p is None or 0 <= min_p <= 1),
            ("repetition_penalty", repetition_penalty, repetition_penalty >= 1),
        ):
            if not is_valid:
                raise ValueError(f"`{name}` is out of its range. Received: {name}={value}")
        super().__init__(temperature=temperature)
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1

    def compute_probabilities(self, logits, seen=None):
        """Filtered probabilities `(b v)` of `logits` `(b v)`; `seen` is a boolean `(b v)`."""
        logits = ops.cast(logits, "float32")
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = ops.where(logits > 0, logits / penalty, logits * penalty)
            logits = ops.where(seen, penalized, logits)
        if self.temperature == 0:
            return ops.softmax(logits)
        probabilities = ops.softmax(logits / self.temperature)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = ops.top_k(probabilities, self.top_k)[0][:, -1:]
            probabilities = keep_at_least(least, probabilities)
        if self.top_p is not None:
            probabilities = keep_at_least(nucleus(probabilities, self.top_p), probabilities)
        if self.min_p is not None:
            likeliest = ops.max(probabilities, axis=-1, keepdims=True)
            probabilities = keep_at_least(self.min_p * likeliest, probabilities)
        return probabilities

    def get_next_token(self, probabilities):
        if self.temperature == 0:
            return ops.argmax(probabilities, axis=-1)
        logits = ops.log(ops.maximum(probabilities, 1e-30))
        logits = ops.where(probabilities > 0, logits, -1e30)
        return keras.random.categorical(logits, 1, seed=self.seed_generator, dtype="int32")[:, 0]

    def get_config(self):
        config = super().get_config()
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
        config.update({name: getattr(self, name) for name in names})
        return config


def keep_at_least(least, probabilities):
    kept = ops.where(probabilities >= least, probabilities, 0.0)
    return kept / ops.sum(kept, axis=-1, keepdims=True)


def nucleus(probabilities, p):
    """The least probability among the fewest likeliest that sum to `p`, `(b 1)`."""
    falling = -ops.sort(-probabilities, axis=-1)
    before = ops.cumsum(falling, axis=-1) - falling
    return ops.min(ops.where(before < p, falling, 1.0), axis=-1, keepdims=True)


def next_tokens(sampler: keras_hub.samplers.Sampler, logits, seen):
    """What `sampler` picks, `(b)`, for `logits` `(b v)` and the ids that a row has had, `(b v)`."""
    if type(sampler) is keras_hub.samplers.GreedySampler:
        return likeliest(logits)
    history = {"seen": seen} if needs_history(sampler) else {}
    return sampler.get_next_token(sampler.compute_probabilities(logits, **history))


def likeliest(logits):
    """`argmax(logits)`. XLA on CPU looks at one id after the other in that, at many in these."""
    v = logits.shape[-1]
    ids = ops.arange(v, dtype="int32")
    highest = ops.max(logits, axis=-1, keepdims=True)
    return ops.min(ops.where(logits == highest, ids, v - 1), axis=-1)


def needs_history(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether `sampler` asks which tokens a row has had."""
    return getattr(sampler, "needs_history", False)


def reseed(sampler: keras_hub.samplers.Sampler, seed: int) -> None:
    """Restarts the random numbers of `sampler`, so that its draws depend on `seed` alone."""
    for variable in sampler.variables:
        variable.assign(keras.ops.convert_to_numpy(keras.random.SeedGenerator(seed).state))


def picks_tokens(sampler: keras_hub.samplers.Sampler) -> bool:
    """Whether `sampler` only picks tokens, by `get_next_token`, and has no loop of its own."""
    return type(sampler).__call__ is keras_hub.samplers.Sampler.__call__
