"""Private parts of `keras.tree`."""

import keras
from keras.src.tree import tree_api


def register_pytree(cls: type) -> None:
    """Lets `keras.tree`, and JAX where it is the backend, look into objects of `cls`.

    `register_tree_node_class`, since `keras.tree` has no public name for it. `cls` has the methods
    `tree_flatten() -> (children, metadata)` and `tree_unflatten(metadata, children)`; the torch
    backend wants `torchtree_flatten() -> (list, metadata)` and `torchtree_unflatten(children,
    metadata)`. Written for Keras 3.15.
    """
    tree_api.register_tree_node_class(cls)
    if keras.config.backend() == "jax":
        import jax

        jax.tree_util.register_pytree_node_class(cls)
