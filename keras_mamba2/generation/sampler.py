import keras
import keras_hub
from keras import ops

from keras_mamba2.arguments import SEED
from keras_mamba2.arguments import check_attributes
from keras_mamba2.arguments import optional
from keras_mamba2.generation.sampling import filtered
from keras_mamba2.generation.sampling import penalized
from keras_mamba2.host.sampling import KINDS
from keras_mamba2.host.sampling import Sampling


@keras.saving.register_keras_serializable(package="keras_mamba2")
class FilterSampler(keras_hub.samplers.Sampler):
    """Draws from the likeliest tokens, with any combination of the usual filters.

    In this order: the repetition penalty, the temperature, `top_k`, `top_p`, `min_p`. Each filter
    sees the probabilities that the one before has left, scaled to sum to 1.

    Args:
        temperature: float, below 1 for safer text, above 1 for wilder text; 0 always takes the
            likeliest token.
        top_k: int, keeps so many of the likeliest tokens. `None` keeps all.
        top_p: float in (0, 1], keeps the likeliest tokens, as few as sum to it. `None` keeps all.
        min_p: float in [0, 1], keeps tokens that are at least `min_p` times as likely as the
            likeliest. `None` keeps all.
        repetition_penalty: float >= 1. Logits of tokens that occurred in the text, prompt
            included, are divided by it if they are positive, and multiplied if negative.
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
        super().__init__(temperature=temperature)
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self.seed = seed
        check_attributes(self, **KINDS, seed=optional(SEED))
        self.seed_generator = keras.random.SeedGenerator(self.seed)

    @property
    def needs_history(self) -> bool:
        return self.repetition_penalty != 1

    def sampling(self, batch_size: int) -> Sampling:
        """The parameters for each of `batch_size` rows."""
        parameters = {name: getattr(self, name) for name in Sampling._fields}
        return Sampling.of_rows(batch_size, **parameters)

    def compute_probabilities(self, logits, seen=None):
        """Filtered probabilities `(b v)` of `logits` `(b v)`; `seen` is a boolean `(b v)`."""
        sampling = self.sampling(logits.shape[0])
        logits = ops.cast(logits, "float32")
        return filtered(logits if seen is None else penalized(logits, sampling, seen), sampling)

    def get_next_token(self, probabilities):
        if self.temperature == 0:
            return ops.argmax(probabilities, axis=-1)
        return self.draw(probabilities)

    def draw(self, probabilities):
        """Draws ids `(b)` from `probabilities` `(b v)`, whatever the temperature."""
        logits = ops.log(ops.maximum(probabilities, 1e-30))
        logits = ops.where(probabilities > 0, logits, -1e30)
        return keras.random.categorical(logits, 1, seed=self.seed_generator, dtype="int32")[:, 0]

    def get_config(self):
        config = super().get_config()
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
        config.update({name: getattr(self, name) for name in names})
        return config
