from collections.abc import Sequence

import keras

from keras_mamba2.arguments import BOOLEAN
from keras_mamba2.arguments import POSITIVE
from keras_mamba2.arguments import RATE
from keras_mamba2.arguments import SIZE
from keras_mamba2.arguments import check_names
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import number
from keras_mamba2.arguments import optional

# By name, since the layers of a model do not share a path. The parameters of the recurrence, scales
# of norms and biases are not matrices: weight decay would change what the layer computes.
NOT_DECAYED = ("A_log", "^D$", "scale", "bias")
EMBEDDINGS = ("embeddings",)


@keras.saving.register_keras_serializable(package="keras_mamba2")
class SelectiveAdamW(keras.optimizers.AdamW):
    """AdamW that saves in its config which variables it does not decay.

    Args:
        *args: see `keras.optimizers.AdamW`.
        not_decayed: sequence of patterns of variable names without weight decay.
        **kwargs: see `keras.optimizers.AdamW`.
    """

    def __init__(self, *args, not_decayed: Sequence[str] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.not_decayed = list(not_decayed)
        self.exclude_from_weight_decay(var_names=self.not_decayed)

    def get_config(self):
        return {**super().get_config(), "not_decayed": self.not_decayed}


def adamw_recipe(
    learning_rate: float,
    steps: int,
    warmup_steps: int | None = None,
    final_fraction: float = 0.1,
    weight_decay: float = 0.1,
    decay_embeddings: bool = True,
    beta_2: float = 0.95,
    global_clipnorm: float = 1.0,
    **kwargs,
) -> keras.optimizers.AdamW:
    """The optimizer that Mamba-2 models are trained with.

    AdamW with a warm-up, a cosine decay, gradients clipped by their global norm, and weight decay
    on matrices only: not on `A_log`, `D`, `dt_bias`, norms and biases.

    Args:
        learning_rate: float, at its peak.
        steps: int, of the whole training, warm-up included.
        warmup_steps: int. `None` takes a twentieth of `steps`.
        final_fraction: float, the learning rate at the end, as a fraction of the peak.
        weight_decay: float, before it is multiplied by the learning rate.
        decay_embeddings: bool, whether embeddings are decayed too.
        beta_2: float, the decay of the second moments.
        global_clipnorm: float, the largest norm of all gradients together.
        **kwargs: see `keras.optimizers.AdamW`, such as `use_ema=True`.

    Example:
    ```python
    lm.compile(optimizer=keras_mamba2.training.adamw_recipe(3e-4, steps=10_000))
    ```

    Reference:
        - [Dao and Gu, 2024, appendix D](https://arxiv.org/abs/2405.21060)
    """
    learning_rate = number(at_least=0)("learning_rate", learning_rate)
    steps = SIZE("steps", steps)
    warmup_steps = optional(integer(at_least=0))("warmup_steps", warmup_steps)
    final_fraction = number(at_least=0)("final_fraction", final_fraction)
    weight_decay = number(at_least=0)("weight_decay", weight_decay)
    decay_embeddings = BOOLEAN("decay_embeddings", decay_embeddings)
    beta_2 = RATE("beta_2", beta_2)
    global_clipnorm = optional(POSITIVE)("global_clipnorm", global_clipnorm)
    check_names(keras.optimizers.AdamW, kwargs)
    for name, value in kwargs.items():
        if isinstance(value, float):
            number()(name, value)
    if warmup_steps is None:
        warmup_steps = steps // 20
    if not warmup_steps < steps:
        raise ValueError(
            "`warmup_steps` must be less than `steps`. "
            f"Received: warmup_steps={warmup_steps}, steps={steps}"
        )
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - warmup_steps,
        alpha=final_fraction,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
    return SelectiveAdamW(
        schedule,
        weight_decay=weight_decay,
        beta_2=beta_2,
        global_clipnorm=global_clipnorm,
        not_decayed=[*NOT_DECAYED, *(() if decay_embeddings else EMBEDDINGS)],
        **kwargs,
    )
