import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_mamba2.arguments import choice
from keras_mamba2.arguments import integer
from keras_mamba2.arguments import optional
from keras_mamba2.generation import Generator
from keras_mamba2.generation.decode import logprob
from keras_mamba2.host.texts import is_one_text
from keras_mamba2.host.texts import texts_of
from keras_mamba2.models.residual_backbone import ResidualBackbone
from keras_mamba2.tasks.batch_checks import check_if_known
from keras_mamba2.tasks.batch_checks import check_mask
from keras_mamba2.tasks.batch_checks import check_targets
from keras_mamba2.tasks.batch_checks import check_token_ids


class Scoring:
    """The part of `Mamba2CausalLM` that says how likely texts are."""

    backbone: ResidualBackbone
    preprocessor: Any  # or None
    num_tokens: int
    logits: Callable[[Any], Any]
    make_generate_function: Callable[[], Generator]

    def perplexity(
        self, texts: str | Sequence[str], stride: int | None = None
    ) -> float | list[float]:
        """exp of the mean loss of a text's tokens, each given all tokens before it.

        The state is carried along: in a pure Mamba-2 model, texts of any length need the same
        memory. The first token has nothing before it, and does not count.

        Args:
            texts: a string, or a list of strings.
            stride: int, after how many tokens the state is reset, as for a model with a limited
                context. `None` never resets it.

        Returns:
            A float for a string, a list of floats for a list.
        """
        is_one = is_one_text(texts)
        stride = optional(integer(at_least=2))("stride", stride)
        if self.preprocessor is None:
            raise ValueError("`perplexity` reads text, which needs a `preprocessor`.")
        loss = self.make_generate_function().loss
        perplexities = []
        texts = texts_of(texts)
        for i, token_ids in enumerate(self.preprocessor.prompts(texts)):
            if len(token_ids) < 2:
                raise ValueError(f"Text {i} has fewer than two tokens: {texts[i]!r}")
            size = stride or len(token_ids)
            pieces = [token_ids[j : j + size] for j in range(0, len(token_ids), size)]
            count = sum(len(piece) - 1 for piece in pieces)
            total = sum(loss(piece) for piece in pieces if len(piece) > 1)
            perplexities.append(math.exp(total / count))
        return perplexities[0] if is_one else perplexities

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode: str = "logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Scores token ids, as other KerasHub models do.

        Args:
            token_ids: int tensor `(b t)`.
            padding_mask: optional tensor `(b t)`, non-zero at real tokens.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: optional function of hidden states `(b t d)` and the index of the
                block they come from, -1 for the embeddings. It returns the hidden states to use
                instead.
            target_ids: int tensor `(b t)`, needed for `"loss"`.

        Returns:
            Logits `(b t v)`, or the loss of each target `(b t)`, in float32.

        Raises:
            ValueError: for an unknown mode, and for token ids and targets out of range. In a
                traced program these are not checked.
        """
        choice("logits", "loss")("scoring_mode", scoring_mode)
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` needs `target_ids`.")
        check_if_known(check_token_ids, token_ids, self.backbone.vocabulary_size)
        if padding_mask is not None:
            check_if_known(check_mask, padding_mask)
        if scoring_mode == "loss":
            check_if_known(check_targets, target_ids, self.num_tokens)
        if padding_mask is None:
            padding_mask = ops.ones(ops.shape(token_ids), "int32")
        x = self.backbone.hidden_states(token_ids, padding_mask, intercept=layer_intercept_fn)
        logits = self.logits(x)
        if scoring_mode == "logits":
            return logits
        return -logprob(logits, target_ids)
