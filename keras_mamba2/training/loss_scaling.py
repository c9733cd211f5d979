"""The loss is scaled in float16, also where a policy is a map of several, as of a quantized model.

Keras compares the name of the policy, which is then another.
"""

from typing import Any

import keras


class ScalesLoss:
    """A model whose `compile` wraps the optimizer as Keras does for `mixed_float16`."""

    optimizer: Any
    dtype_policy: Any

    def compile(self, *args, **kwargs) -> None:
        super().compile(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("auto_scale_loss", True):
            self.optimizer = scaled(self.optimizer, self.dtype_policy)


def scaled(optimizer, policy):
    """`optimizer`, or one that scales the loss by it if the policy wants that."""
    is_float16 = getattr(policy, "default_policy", policy).name == "mixed_float16"
    if optimizer is None or not is_float16:
        return optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
